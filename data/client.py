"""How do we ask a model on a server?

Servers that speak OpenAI's protocol differ: in the parameters that they refuse, in speed and in
errors. Client.ask tries again, leaves parameters out, gives up on a question, or stops everything.
grade.py asks a judge with it, study/generate.py a teacher.
"""

import argparse
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from data import common

# Dollars per million tokens in and out, November 2026; another model's price is unknown (nan).
PRICES = {"gpt-6-luna": (0.10, 0.50), "gpt-6-sol": (2, 10), "gpt-6-astra": (10, 50)}
BACKOFF = 0.5                   # seconds before the first retry, doubled each time
LOCK = threading.Lock()         # one thread at a time writes a line or counts dollars


def append_line(path, record):
    """Append a JSON line. The newline comes first, because a crash may have cut the last line."""
    with LOCK, open(path, "ab") as file:
        file.write(b"\n" + json.dumps(record).encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path, strict=False):
    """The objects in a .jsonl file; [] if there is no file. Damaged lines are left out, because a
    crash may have cut them; with strict, they are an error."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif strict and line.strip():
            raise SystemExit(f"{path}: not a JSON object: {line[:80]}")
    return records


def read_reply(body):
    """The body of a response, perhaps a stream of chunks -> what is stored of it, or None."""
    try:
        chunks = re.findall(r"(?m)^data: ?(\{.*)", body) or [body]
        chunks = [json.loads(chunk) for chunk in chunks]
        choices = [choice for chunk in chunks for choice in chunk.get("choices") or []]
        text, usage = "", chunks[-1].get("usage") or {}
        for choice in choices:
            message = choice.get("message") or choice["delta"]
            content = message.get("content") or message.get("refusal") or ""
            if isinstance(content, list):
                content = "".join(part.get("text", "") for part in content)
            text += content
        return {"text": text, "finish": choices[-1].get("finish_reason"),
                "model": chunks[-1].get("model"), "date": time.strftime("%Y-%m-%d %H:%M"),
                "tokens": [usage.get("prompt_tokens"), usage.get("completion_tokens")]}
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        return None


class Client:
    """A model on a server. ask() may run in many threads. parameters: for each turn, the sets to
    try; after a reply, only one. works: whether there was a reply. failures: questions without a
    reply since the last one. spent: dollars, at most. stop: why nothing more is sent, or ""."""

    def __init__(self, args, model, schema=None, temperature=0, max_tokens=1000):
        self.args, self.name, self.url = args, model, args.base_url.rstrip("/")
        self.is_local = self.url.startswith("http://")          # remote servers have https://
        self.key = os.environ.get("OPENAI_API_KEY") or "no-key" * self.is_local
        if not args.dry_run and not re.fullmatch("[!-~]+", self.key):
            raise SystemExit("Set a key, without line breaks or spaces: export OPENAI_API_KEY=...")
        self.workers = args.workers or (1 if self.is_local else 8)
        self.slots = threading.Semaphore(self.workers)          # requests at a time
        self.spare = threading.Semaphore(self.workers - 1)      # slots that timeouts may take away
        self.timeout = args.timeout or (600 if self.is_local else 60)
        self.max_tokens = args.max_tokens or max_tokens
        is_openai = re.search("openai|azure", self.url)         # others know the older name
        limit = {"max_completion_tokens" if is_openai else "max_tokens": self.max_tokens}
        usual = {"temperature": temperature, **limit}           # some servers refuse some of it
        as_stream = {"extra_body": {"stream": True}}            # openai reads it as a whole
        sets = [{"reasoning_effort": "none", **usual}, usual, limit, {}, as_stream]
        self.parameters = [sets, [{**each, "response_format": schema} for each in sets] + sets]
        self.price = np.array(PRICES.get(model, (np.nan, np.nan))) / 1e6
        self.works, self.failures, self.spent, self.stop = False, 0, 0.0, ""
        import openai  # here, because it is slow
        try:
            self.api = openai.OpenAI(api_key=self.key or "none", base_url=self.url,
                                     timeout=self.timeout, max_retries=0)
        except (ImportError, ValueError) as error:              # e.g. SOCKS without its package
            raise SystemExit(f"Wrong --base-url, or wrong proxy in the environment: {error}")

    def spent_text(self):
        return f"at most ${self.spent:.2f}".replace("at most $nan", "an unknown amount")

    def send(self, messages, parameters):
        """One request -> HTTP status (0: none), body or error, text of the header Retry-After."""
        import openai
        messages = [{**message, "content": message["content"].encode("utf-8", "replace").decode()}
                    for message in messages]        # no lone surrogates
        try:
            response = self.api.chat.completions.with_raw_response.create(
                model=self.name, messages=messages, **parameters).http_response
        except openai.APITimeoutError:
            return 504, f"no reply within {self.timeout:g} s (--timeout)", ""
        except openai.APIConnectionError as error:
            return 0, f"cannot reach {self.url}: {error.__cause__ or error}", ""
        except openai.APIStatusError as error:
            response = error.response
        body = response.content.decode("utf-8", "replace")
        return response.status_code, body, response.headers.get("retry-after", "")

    def post(self, messages, parameters):
        """send() within the limits -> status, reply (dict) or error (str), seconds to wait."""
        # A cautious estimate: 3 characters per token. confirm_cost expects 4.
        highest_cost = self.price @ (len(str(messages)) / 3, self.max_tokens)
        with self.slots:
            if self.spent + self.workers * highest_cost > self.args.max_cost:
                self.stop = f"--max-cost {self.args.max_cost} is reached"
            if self.stop:
                return 0, self.stop, 0
            status, body, wait = self.send(messages, parameters)
        reply = read_reply(body) if status == 200 else None
        with LOCK:
            if reply and None not in reply["tokens"]:
                self.spent += self.price @ reply["tokens"]
            elif status in (200, 504):
                self.spent += highest_cost
        return status, reply or body, int(wait) if wait.isdecimal() else 0

    def next_step(self, status, error, wait, tries):
        """What to do after a failure: "stop", "retry", send "fewer parameters", or "give up"."""
        temporary = status in (0, 200, 408, 409, 429) or status >= 500
        if (status in (401, 402) or status in (403, 404) and not self.works
                or "insufficient_quota" in error or wait > 300
                or self.failures >= 5 and (temporary or not self.works)):
            return "stop"
        if temporary and tries < (7 if self.works and status not in (500, 504) else 3):
            return "retry"
        return "fewer parameters" if status in (400, 422, 500) else "give up"

    def ask(self, messages, turn=0):
        """-> the reply (dict, as stored), or why there is none (str)."""
        sets, tries, first_error = self.parameters[turn], 0, ""
        while sets and not self.stop:
            status, reply, wait = self.post(messages, sets[0])
            if isinstance(reply, dict):
                if left_out := ", ".join(sorted(self.parameters[turn][0].keys() - sets[0])):
                    tqdm.write(f"{self.name} works without {left_out}: {first_error}", sys.stderr)
                self.parameters[turn], self.works, self.failures = sets[:1], True, 0
                sent = [name.replace("extra_body", "stream") for name in sorted(sets[0])]
                return {**reply, "sent": sent}
            tries += 1
            error = f"HTTP {status}: {reply}" if status else reply
            error = common.printable(" ".join(error.replace(self.key, "***").split()))[:300]
            error += f" (asks to wait {wait} s)" * (wait > 0)
            first_error = first_error or error
            step = self.next_step(status, reply, wait, tries)
            if step == "stop":
                self.stop = self.stop or (
                    f"{self.url} fails or refuses all requests. Check OPENAI_API_KEY, the name of "
                    f"the model and --base-url (most servers need .../v1). Or there is no quota "
                    f"left. {error}")
            elif step == "fewer parameters":
                sets, tries = sets[1:], 0
            elif step == "give up":
                break
            else:
                if wait:
                    tqdm.write(error, sys.stderr)
                if status == 504 and self.spare.acquire(blocking=False):
                    self.slots.acquire()            # for good: fewer requests at a time
                end = time.monotonic() + (wait or BACKOFF * 2 ** (tries - 1))
                while time.monotonic() < end and not self.stop:
                    time.sleep(0.01)
        self.failures += 1
        return first_error or "not asked: stopped"


def confirm_cost(client, what, conversations, calls, tokens_out):
    """Print what will be sent and its price; above $1, ask for --yes. A dry run ends here."""
    args, tokens_in = client.args, len(str(conversations)) // 4 * calls // len(conversations)
    cost = client.price @ (tokens_in, tokens_out)
    for message in conversations[0] if args.dry_run else []:
        print(f"[{message['role']}]\n{common.printable(message['content'])}\n")
    print(f"{what}: {calls:,} calls to {client.name} at {client.url}, about {tokens_in:,} tokens "
          f"in and {tokens_out:,} out, " + f"${cost:.2f}".replace("$nan", "price unknown"))
    if args.dry_run:
        raise SystemExit(0)
    if args.max_cost < np.inf and np.isnan(cost):
        raise SystemExit(f"--max-cost: add the price of {client.name} to PRICES in data/client.py")
    if not args.yes and (cost > 1 or np.isnan(cost) and not client.is_local):
        raise SystemExit("Nothing was sent yet. Add --yes to continue, perhaps with --max-cost.")


def ask_all(client, ask, items, label):
    """Call ask(item) for each item: one by one until the server has replied, then in threads."""
    items, bar = iter(items), tqdm(desc=label, total=len(items))
    with bar, ThreadPoolExecutor(client.workers) as pool:
        try:
            while not client.works and (item := next(items, None)):
                ask(item)
                bar.update()
            for _ in pool.map(ask, items):
                bar.update()
        except KeyboardInterrupt:
            client.stop = "Stopped"


def above_zero(kind):
    """The type of an option whose value is a number (int or float) above 0."""
    def number(text):
        if not 0 < kind(text) < 1e9:
            raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
        return kind(text)
    return number


def add_server_options(parser):
    add = parser.add_argument
    add("--base-url", help="address of the server (default: OpenAI's)",
        default=os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
    count, number = above_zero(int), above_zero(float)
    add("--workers", type=count, help="requests at a time (default 8; 1 on a local server)")
    add("--timeout", type=number, help="seconds for a reply (default 60; 600 on a local server)")
    add("--max-tokens", type=count, help="limit per reply, including its thinking")
    add("--dry-run", action="store_true", help="show a request and the price; send nothing")
    add("--max-cost", type=number, default=np.inf, help="stop before spending this many dollars")
    add("--yes", action="store_true", help="continue although it costs more than $1")
