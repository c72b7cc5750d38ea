"""A minimal HTTP server of a run's model, with the standard library alone.

    python examples/serve.py --workdir=runs/fp8_base-tiny --port=8000
    curl -d '{"prompt": "Anne Elliot", "tokens": 50}' http://127.0.0.1:8000

It takes one request at a time, on this machine alone, and is no more than an example.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import fp8jax

LONGEST = 1 << 20  # bytes of a request
OPTIONS = ("tokens", "temperature", "top_p", "seed")


def answer(run, request):
    """Return the answer to a request, a dictionary with `prompt` and OPTIONS.

    Raises:
        ValueError: the request is none, or an option is out of range.
    """
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise ValueError("prompt: is missing, or no text")
    options = {name: value for name, value in request.items() if name != "prompt"}
    for name, value in options.items():
        if name not in OPTIONS or isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}: is no number, or unknown; there are {', '.join(OPTIONS)}")
        if name in ("tokens", "seed") and not isinstance(value, int):
            raise ValueError(f"{name}: {value} is not a whole number")
    return {"text": fp8jax.generate(run, request["prompt"], **options)}


def server(run, port):
    """Return a server of a run on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            try:
                length = int(self.headers.get("Content-Length", 0))
                if not 0 < length <= LONGEST:
                    raise ValueError(f"Content-Length: {length} is not from 1 to {LONGEST}")
                self.reply(200, answer(run, json.loads(self.rfile.read(length))))
            except (ValueError, RecursionError) as error:
                self.reply(400, {"error": str(error)})

        def reply(self, status, values):
            body = json.dumps(values).encode() + b"\n"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer(("127.0.0.1", port), Handler)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    try:
        run = fp8jax.load_run(options.workdir)
    except ValueError as error:
        parser.error(str(error))
    with server(run, options.port) as serving:
        print(f"serving {options.workdir}, step {run.step}, on port {serving.server_port}")
        serving.serve_forever()


if __name__ == "__main__":
    main()
