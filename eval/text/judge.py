"""A judge behind an OpenAI-compatible endpoint: one answer in, a rating from 1 to 10 out.

By the standard library's urllib: it is one POST request, for which no package has to be installed,
and retries are ours in any case, since a rating that can't be read is asked for again too.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bilora_diffusion.errors import UserError

KEY = "JUDGE_API_KEY"
"""The environment variable of the key. It is one of its own, so that no other service's is sent."""
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
LONGEST_WAIT = 60.0
_RATING = r"(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?"
_FORMS = (
    re.compile(rf"\[\[\s*(?:rating:?\s*)?{_RATING}\]\]", re.IGNORECASE),
    re.compile(rf"rating\W{{0,6}}{_RATING}", re.IGNORECASE),
    re.compile(rf"\[\s*{_RATING}\]"),
)
"""How a rating is written, the asked form first."""


def rating(text: str) -> float | None:
    """The last rating in a judge's words, from 1 to 10; None if there is none."""
    for form in _FORMS:
        values = [float(found) for found in form.findall(text)]
        valid = [value for value in values if 1 <= value <= 10]
        if valid:
            return valid[-1]
    return None


@dataclass(frozen=True)
class Judge:
    """Where ratings come from.

    Args:
        base_url: up to and with "/v1".
        model: the endpoint's name for it.
        key: sent as bearer token; "" sends none. Never shown.
        attempts: requests per rating before it is given up.
        timeout: seconds of one request.
        wait: seconds before the second attempt, doubled each time.
        max_tokens: longest reply; None leaves it to the endpoint.
    """

    base_url: str
    model: str
    key: str = field(default="", repr=False)
    attempts: int = 5
    timeout: float = 120.0
    wait: float = 1.0
    max_tokens: int | None = 2048

    def ask(self, prompt: str, sleep: Callable[[float], object] = time.sleep) -> str:
        """The judge's reply at temperature 0.

        Raises:
            UserError: the endpoint refuses, or can't be reached after all attempts.
        """
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                sleep(min(LONGEST_WAIT, self.wait * 2 ** (attempt - 1)))
            try:
                return self._once(prompt)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(2000).decode("utf-8", "replace")
                reason = f"{error.code} {self._without_key(said)}"
                if error.code not in AGAIN:
                    raise UserError(
                        f"the judge at {self.base_url} refuses ({' '.join(reason.split())[:240]}):"
                        f" check --judge_base_url, --judge_model and {KEY}."
                    ) from None
                told = error.headers.get("Retry-After", "")
                if told.isdecimal() and attempt + 1 < self.attempts:
                    sleep(min(LONGEST_WAIT, float(told)))
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                reason = self._without_key(f"{type(error).__name__}: {error}")
        raise UserError(
            f"the judge at {self.base_url} gave no answer in {self.attempts} attempts"
            f" ({' '.join(reason.split())[:240]}): check that it runs; the same command goes on."
        )

    def _once(self, prompt: str) -> str:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            found = json.loads(reply.read())
        try:
            return str(found["choices"][0]["message"]["content"] or "")
        except (IndexError, TypeError) as error:
            raise ValueError("the reply holds no message") from error

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def connect(base_url: str | None, model: str | None) -> Judge:
    """The judge that a command line names; nothing is sent yet.

    Raises:
        UserError: no endpoint, no model, or a URL that is none or holds a secret.
    """
    if not base_url or not model:
        raise UserError(
            "mtbench needs a judge: give --judge_base_url (such as http://localhost:8000/v1) and"
            f" --judge_model, and the key, if it asks for one, in the environment variable {KEY}."
        )
    parts = urllib.parse.urlsplit(base_url)
    if parts.username or parts.password or parts.query:
        raise UserError(
            "--judge_base_url holds a user name or a query, which would be written into the"
            f" result: give the bare address, and the key in {KEY}."
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(
            f'--judge_base_url "{base_url}" is no address: write it like http://localhost:8000/v1.'
        )
    return Judge(base_url.rstrip("/"), model, os.environ.get(KEY, ""))
