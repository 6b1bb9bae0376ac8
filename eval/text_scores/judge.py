"""A judge behind an OpenAI-compatible endpoint: one answer in, a rating from 1 to 10 out."""

from __future__ import annotations

import importlib.util
import os
import re
import urllib.parse
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bilora_diffusion.errors import UserError

KEY = "JUDGE_API_KEY"
"""The environment variable of the key. It is one of its own, so that no other service's is sent."""
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
        values = [float(number) for number in form.findall(text)]
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
        attempts: requests per rating before it is given up, ever longer apart, or as far as the
            endpoint asks for.
        timeout: seconds of one request.
        max_tokens: longest reply.
    """

    base_url: str
    model: str
    key: str = field(default="", repr=False)
    attempts: int = 8
    timeout: float = 120.0
    max_tokens: int = 2048

    def ask(self, prompt: str) -> str:
        """The judge's reply at temperature 0.

        Raises:
            UserError: the endpoint refuses, or gives no answer in all attempts.
        """
        from openai import OpenAIError

        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=self.max_tokens,
                extra_headers=self._headers,
            )
            return (reply.choices[0].message.content or "") if len(reply.choices) else ""
        except (AttributeError, TypeError):  # the package hands on what is no such reply as it is
            reason = "its reply is no chat completion"
        except (OpenAIError, ValueError) as error:
            reason = f"{error} {error.__cause__ or ''}"
        reason = reason.replace(self.key, "***") if self.key else reason
        raise UserError(
            f"the judge at {self.base_url} gave no answer ({' '.join(reason.split())[:240]}):"
            f" check that it runs, --judge_base_url, --judge_model and {KEY}; the same command"
            " goes on."
        )

    @property
    def _headers(self) -> dict[str, Any]:
        from openai import Omit

        # What the package would send of another service that the environment names is left out.
        of_others = dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), Omit())
        return of_others | {"Authorization": f"Bearer {self.key}" if self.key else Omit()}

    @cached_property
    def _client(self) -> Any:
        from openai import OpenAI  # here, since only MT-Bench needs the package

        key, retries = self.key or "none", self.attempts - 1
        return OpenAI(
            base_url=self.base_url, api_key=key, max_retries=retries, timeout=self.timeout
        )


def connect(base_url: str | None, model: str | None) -> Judge:
    """The judge that a command line names; nothing is sent yet.

    Raises:
        UserError: no endpoint, no model, no package, or a URL that is none or holds a secret.
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
    if importlib.util.find_spec("openai") is None:
        raise UserError("the package that asks the judge is missing: run `pip install openai`.")
    return Judge(base_url.rstrip("/"), model, os.environ.get(KEY, ""))
