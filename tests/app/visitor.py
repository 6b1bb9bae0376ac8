"""A visitor of the viewer without a browser."""

import http.client
import json
from dataclasses import dataclass
from typing import Any

LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class Visitor:
    """A client that sends requests and events to the viewer on a local port."""

    port: int

    def ask(
        self, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> http.client.HTTPResponse:
        """Send a request, without normalizing its path, and return the response."""
        connection = http.client.HTTPConnection(LOCAL, self.port, timeout=120)
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", **headers}
        connection.request(method, path, content, headers)
        return connection.getresponse()

    def events(self, element: str | None = None) -> list[tuple[int, list[Any]]]:
        """Return the events of the element with this id; without an id, all events of the server.

        Returns:
            The number of each event, and the values of its inputs on a new page.
        """
        config = json.load(self.ask("/config"))
        properties = {part["id"]: part["props"] for part in config["components"]}
        events = []
        for event in config["dependencies"]:
            target, _ = event["targets"][0]
            name = properties.get(target, {}).get("elem_id")
            if event["backend_fn"] and element in (None, name):
                values = [properties[part].get("value") for part in event["inputs"]]
                events.append((event["id"], values))
        return events

    def send(self, event: int, values: list[Any], data: Any = None) -> str:
        """Send an event and return the server's response."""
        body = {"data": values, "fn_index": event, "event_data": data, "session_hash": "visitor"}
        assert self.ask("/gradio_api/queue/join", "POST", body).status == 200
        text = ""
        for line in self.ask("/gradio_api/queue/data?session_hash=visitor"):
            text += line.decode()
            if "close_stream" in text:
                break
        assert text.count("process_completed") == 1
        return text
