"""Training runs in forked processes, each with a fault of its own: imports, most of a tiny run's time, are done once.

Reads jobs from stdin, one JSON object a line (see `forks` in conftest.py), and answers each with its ranks' exit codes.
The faults are real ones, at a place that is counted, not timed; the training program does not know of them.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}  # Python's names: see `sys.addaudithook`


def in_save(step, before, after=lambda: None):
    """Call `before()` whenever the saving of `step` takes over the main thread, and `after()` when it lets it go: once,
    or with --async_save at its beginning and at its end."""
    from train import checkpoint

    def watch(true, at):
        def call(*arguments):
            if at(arguments) != step:
                return true(*arguments)
            before()
            try:
                return true(*arguments)
            finally:
                after()

        return call

    background = checkpoint.BackgroundSave
    checkpoint.save = watch(checkpoint.save, lambda arguments: arguments[1])  # folder, step
    background.__init__ = watch(background.__init__, lambda arguments: arguments[2])
    background.finish = watch(background.finish, lambda arguments: arguments[0].step)


def at_file_operation(step, number, act):
    """Call `act()` right before the number-th operation (from 1) on files that the saving of `step` makes.

    Counted are changes, and the first opening of every file: between them lie the writing and flushing of one file; by
    the main thread, or the one that writes with --async_save, where `step` is the first that is saved.
    """
    active, seen, opened = [], [0], set()

    def hook(event, arguments):
        thread = threading.current_thread()
        if thread.name != "checkpoint" and not (active and thread is threading.main_thread()):
            return
        if event not in CHANGES:
            if event != "open" or not isinstance(arguments[0], str) or arguments[0] in opened:
                return
            opened.add(arguments[0])
        seen[0] += 1
        if seen[0] == number:
            act()

    sys.addaudithook(hook)
    in_save(step, lambda: active.append(True), active.clear)


def kill_at_file_operation(step, number):
    at_file_operation(step, number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def signal_at_file_operation(step, number, which):
    at_file_operation(step, number, lambda: os.kill(os.getpid(), which))


def die_in_write(step, size):
    """The kernel kills the process within `save_file`, as a file of the saving of `step` grows past `size` bytes."""

    def begin():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    in_save(step, begin)


def poison_loss(steps, value):
    """Multiply the target of this rank by `value` (nan, inf) in these steps."""
    from train import loop

    count, true = [0], loop.velocity

    def velocity(data, noise):
        count[0] += 1
        return true(data, noise) * (float(value) if count[0] in steps else 1.0)

    loop.velocity = velocity


def poison_gradient(steps, value):
    """Add `value` to one element of the gradient of this rank's velocity in these steps; the loss stays finite."""
    from sr_model import DiT

    count, true = [0], DiT.forward

    def forward(self, *arguments, **named):
        out = true(self, *arguments, **named)
        if out.requires_grad:
            count[0] += 1
            if count[0] in steps:

                def spoil(gradient):
                    gradient = gradient.clone()
                    gradient.view(-1)[0] += float(value)
                    return gradient

                out.register_hook(spoil)
        return out

    DiT.forward = forward


def rank(job, number, port):
    """One rank of a job in this forked process; does not return."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    world = str(job["world"])
    os.environ.update(WORLD_SIZE=world, LOCAL_SIZE=world, RANK=str(number), LOCAL_RANK=str(number))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from train.run import main

    code = 1
    try:
        for name, arguments in job["faults"].get(str(number), []):
            globals()[name](**arguments)
        code = main(job["argv"])
        with contextlib.suppress(ValueError):  # none was begun
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(job):
    """Exit code of every rank; negative, the signal that ended it; None where it had to be killed in the end."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for number in range(job["world"]):
        children.append(os.fork())
        if not children[-1]:
            rank(job, number, port)
    end, codes = time.monotonic() + job["seconds"], [None] * job["world"]
    while None in codes and time.monotonic() < end:
        for number, child in enumerate(children):
            if codes[number] is None:
                pid, status = os.waitpid(child, os.WNOHANG)
                codes[number] = os.waitstatus_to_exitcode(status) if pid else None
        time.sleep(0.01)
    for number, child in enumerate(children):
        if codes[number] is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return codes


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some of what is imported prints
    importlib.import_module("train.loop")  # everything heavy, with no thread begun

    assert len(os.listdir("/proc/self/task")) == 1, "a forked process would lack the other threads"
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
