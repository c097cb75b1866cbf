"""The subcommand `recaption`: a caption column more, written by a vision-language model behind a chat endpoint.

Any server that speaks OpenAI's chat completions will do, such as `vllm serve Qwen/Qwen3-VL-4B-Instruct`. Each answer is
kept in OUT/answers/SPLIT/SHARD.jsonl as it comes: a resumed command asks nothing twice but what was in flight.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import threading
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from train.prepare.rewrite import Added, Outcome, Sample, Tick, find_splits, rewrite
from train.shapes.corpus import BadArgument

PROMPT = (
    "Describe this image in one dense paragraph for someone who cannot see it. State only what is visible: the"
    " subjects and how many there are, their attributes and actions, where they stand to each other, the background,"
    " the lighting, the style or medium, and any text, quoted exactly. Do not guess at names, intentions or what is"
    " outside the frame, and do not begin with 'The image' or 'This image'."
)
MEDIA = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


class Unusable(ConnectionError):
    """The endpoint cannot be reached, refuses the key or the model, or fails again and again: nothing more is asked."""


class _Answers:
    """The answers of one shard, on disk as they come; those of an earlier, killed process are taken over."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[int, dict[str, Any]] = {}
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break  # killed while it was written
                row = json.loads(line)
                self.rows[row["index"]] = row
                whole += len(line)
            os.truncate(path, whole)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self.lock = threading.Lock()

    def add(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows[row["index"]] = row
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


class Captioner:
    """Asks for a caption of each sample's image, several at a time."""

    def __init__(
        self, answers: Path, client: Any, model: str, prompt: str, caption: str, concurrency: int, max_tokens: int,
        temperature: float, give_up: int,
    ) -> None:  # fmt: skip
        self.answers, self.client, self.model, self.prompt, self.caption = answers, client, model, prompt, caption
        self.concurrency, self.max_tokens, self.temperature = concurrency, max_tokens, temperature
        self.give_up, self.failed_in_a_row = give_up, 0

    def __call__(self, place: str, samples: list[Sample], tick: Tick) -> Outcome:
        """rewrite.Added.compute. Raises: Unusable."""
        answers = _Answers(self.answers / f"{place}.jsonl")
        known = {at for at, row in answers.rows.items() if "error" not in row}  # failures are asked again
        tick(len(known))

        stop = threading.Event()

        def one(at: int) -> None:
            if stop.is_set():
                return
            try:
                answers.add({"index": at, **self._ask(samples[at]["image"])})
            except BaseException:
                stop.set()  # at once: the pool's cancelling comes after its threads have begun the next question
                raise
            tick(1)

        pool = ThreadPoolExecutor(self.concurrency)
        try:
            asked = [pool.submit(one, at) for at in range(len(samples)) if at not in known]
            done, _ = wait(asked, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            answers.file.close()
        values, quarantined, counts = [], [], Counter[str]()
        for at, sample in enumerate(samples):
            text, reason, detail = judge(answers.rows[at])
            if reason:
                quarantined.append((at, reason, detail))
            counts["captioned" if not reason else "kept their caption"] += 1
            counts["cut at max-tokens"] += answers.rows[at].get("finish_reason") == "length" and not reason
            for name in ("prompt_tokens", "completion_tokens"):
                counts[name] += answers.rows[at].get("usage", {}).get(name) or 0
            values.append(text or sample[self.caption])
        return Outcome(values, quarantined, dict(counts))

    def _ask(self, image: bytes) -> dict[str, Any]:
        """One question's answer as it is kept: {"model", "finish_reason", "usage", "content", ...} or {"error"}."""
        import openai

        media = next((media for magic, media in MEDIA.items() if image.startswith(magic)), "application/octet-stream")
        url = f"data:{media};base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.prompt}]
        try:
            response = self.client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=self.max_tokens,
                temperature=self.temperature,
            )
            row = read_answer(response.http_response.text)
        except openai.APITimeoutError:
            row = {"error": "timeout"}
        except openai.APIConnectionError as error:
            raise Unusable(f"base-url: {self.client.base_url} cannot be reached: {error.__cause__ or error}") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise Unusable(
                f"OPENAI_API_KEY: {self.client.base_url} answers {error.status_code}, wanted a key it accepts"
            ) from None
        except openai.NotFoundError as error:
            raise Unusable(f"model: {self.client.base_url} answers 404 for {self.model!r}: {_short(error)}") from None
        except openai.APIStatusError as error:
            row = {"error": f"status {error.status_code}: {_short(error)}"}
        self.failed_in_a_row = self.failed_in_a_row + 1 if "error" in row else 0
        if self.failed_in_a_row >= self.give_up:
            raise Unusable(f"base-url: {self.client.base_url} failed {self.give_up} times in a row: {row['error']}")
        return row


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_answer(text: str) -> dict[str, Any]:
    """What is kept of a chat completion's JSON; {"error": ...} where it is none."""
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        if not isinstance(content, str | None):
            raise TypeError(f"content is a {type(content).__name__}")
        return {
            "model": answer.get("model"),
            "finish_reason": choice.get("finish_reason"),
            "usage": answer.get("usage") if isinstance(answer.get("usage"), dict) else {},
            "content": content,
            **({"refusal": refusal} if refusal else {}),
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return {"error": f"not a chat completion ({error!r}): {text[:200]}"}


def judge(row: dict[str, Any]) -> tuple[str, str, str]:
    """(caption, "", "") of a kept answer, or ("", reason, detail) where it gives none."""
    if "error" in row:
        return "", "failed", row["error"]
    if row.get("refusal") or row["finish_reason"] == "content_filter":
        return "", "refused", row.get("refusal") or "content filter"
    text = (row["content"] or "").strip()
    return (text, "", "") if text else ("", "empty", f"finish reason {row['finish_reason']}")


def prepare_recaption(
    source: str | Path,
    out: str | Path,
    *,
    base_url: str = "http://localhost:8000/v1",
    model: str = "Qwen/Qwen3-VL-4B-Instruct",
    prompt: str = PROMPT,
    column: str = "recaption",
    caption: str = "caption",
    concurrency: int = 32,
    retries: int = 5,
    timeout: float = 120.0,
    max_tokens: int = 512,
    temperature: float = 0.0,
    give_up: int = 100,
    compression: str = "same",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes `source` into `out` with the column `column`: a model's caption, or the old one where it gave none.

    prompt: a text, or @FILE. caption: the column that an image keeps for its caption when the model refuses, answers
    nothing, or fails; those are listed in quarantine.jsonl. Returns the report (rewrite.rewrite).

    Raises: BadArgument; Unusable, an OSError, when the endpoint is of no use; BrokenShard.
    """
    try:
        import openai
    except ImportError:
        raise BadArgument("openai: recaption needs it, pip install 'semantic-routing[prepare]'") from None
    if prompt.startswith("@"):
        if not Path(prompt[1:]).is_file():
            raise BadArgument(f"prompt: wanted a text or @FILE, found no file {prompt[1:]!r}")
        prompt = Path(prompt[1:]).read_text(encoding="utf-8").strip()
    for name, value, least in (
        ("concurrency", concurrency, 1), ("retries", retries, 0), ("timeout", timeout, 1e-3),
        ("max-tokens", max_tokens, 1), ("temperature", temperature, 0), ("give-up", give_up, 1),
    ):  # fmt: skip
        if not least <= value < float("inf"):
            raise BadArgument(f"{name}: wanted a number of at least {least}, got {value}")
    if not column.isidentifier():
        raise BadArgument(f"column: wanted a name of letters, digits and _, got {column!r}")
    for name, index in find_splits(Path(source)).items():
        for shard in index["shards"][:1]:
            if not {caption, "image"} <= {*shard["column_names"]}:
                have = ", ".join(shard["column_names"])
                raise BadArgument(f"caption: wanted the columns image and {caption}, {source}/{name} has {have}")
    # A server of one's own wants no key, the client does.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    asked = {
        "model": model, "prompt": prompt, "column": column, "caption": caption, "max_tokens": max_tokens,
        "temperature": temperature,
    }  # fmt: skip
    with openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=retries) as client:
        captioner = Captioner(
            Path(out) / "answers", client, model, prompt, caption, concurrency, max_tokens, temperature, give_up
        )
        added = Added(column, "str", captioner)
        report = rewrite(source, out, added, asked, compression=compression, progress=progress)
    kept = ", ".join(f"{count} {reason}" for reason, count in report["quarantined"].items())
    counted = f"{report['counts'].get('captioned', 0)} of {report['samples']} samples in {out}"
    print(f"recaption: {counted}" + (f"; old caption kept: {kept}" if kept else ""), file=sys.stderr)
    return report


def add_recaption(commands: Any) -> None:
    """The subcommand's flags."""
    parser = commands.add_parser(
        "recaption",
        help="a new caption column, written by a vision-language model",
        description="Writes a prepared folder into a new one with one more caption column, asked of an"
        " OpenAI-compatible chat endpoint (the key, if it wants one, from OPENAI_API_KEY). An image whose answer is"
        " empty, refused or failed after all retries keeps its old caption and is listed in OUT/quarantine.jsonl. All"
        " answers are kept in OUT/answers; the same command continues an interrupted one and asks nothing twice.",
        epilog="example: vllm serve Qwen/Qwen3-VL-4B-Instruct, then: python -m train.prepare recaption"
        " --source data/laion --out data/laion-recaptioned --concurrency 64",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    required = {"required": True, "metavar": "DIR", "default": argparse.SUPPRESS}
    add("--source", help="a prepared folder: train/ and val/", **required)
    add("--out", help="folder to write; new, empty or begun by this command", **required)
    add("--base-url", default="http://localhost:8000/v1", metavar="URL", help="the endpoint")
    add("--model", default="Qwen/Qwen3-VL-4B-Instruct", metavar="NAME", help="the model's name there")
    add("--prompt", default=PROMPT, metavar="TEXT|@FILE", help="what is asked about every image")
    add("--column", default="recaption", metavar="NAME", help="name of the new column")
    add("--caption", default="caption", metavar="NAME", help="column whose text is kept where there is no answer")
    add("--concurrency", type=int, default=32, metavar="N", help="questions in flight")
    add(
        "--retries",
        type=int,
        default=5,
        metavar="N",
        help="after 429, 5xx, timeouts and lost connections, with backoff",
    )
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one answer")
    add("--max-tokens", type=int, default=512, metavar="N", help="an answer's longest; longer ones are cut and counted")
    add("--temperature", type=float, default=0.0, metavar="T", help="of the sampling; 0 is greedy")
    add("--give-up", type=int, default=100, metavar="N", help="stop after so many failed questions in a row")
    add("--compression", default="same", choices=("same", "none", "zstd"), help="of the new shards")
    parser.set_defaults(prepare=prepare_recaption)
