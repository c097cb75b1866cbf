"""A server on loopback that speaks chat completions, misbehaves as told, and logs every question it was asked."""

import base64
import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def digest(image):
    """What the log and the answers call an image."""
    return hashlib.sha256(image).hexdigest()[:16]


def completion(content, finish_reason="stop", **message):
    """The JSON body of a chat completion, as vLLM sends it."""
    message = {"role": "assistant", "content": content, **message}
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": "served-model",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
        }
    )


def good(image, attempt):
    """A behaviour: (status, body) for an image's digest and how often it was asked before."""
    return 200, completion(f" a caption of {image}\n")


class Server:
    """`asked` counts questions by image digest; `requests` holds the last body and headers."""

    def __init__(self, behave):
        self.behave, self.asked, self.lock = behave, Counter(), threading.Lock()
        self.body, self.headers, self.stop = None, None, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                url = body["messages"][0]["content"][0]["image_url"]["url"]
                image = digest(base64.b64decode(url.partition(",")[2]))
                with outer.lock:
                    attempt = outer.asked[image]
                    outer.asked[image] += 1
                    outer.body, outer.headers = body, self.headers
                status, text = outer.behave(image, attempt)
                if status == "hang":
                    outer.stop.wait(60)  # until the test is over: the client has given up long before
                    return
                data = text.encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.send_header("retry-after-ms", "1")
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:
                    pass  # the client was killed

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@contextmanager
def serving(behave=good):
    """A Server that answers until the block ends."""
    server = Server(behave)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()
