"""Serve learns which models a replica holds, and no request waits for that."""

from __future__ import annotations

import asyncio
from typing import Any

from eagleray.flows.multiplexing import HEADER, Touching
from eagleray.serving import refusals


class Asked:
    """An app, and what Serve's multiplexing is told, which waits until it is let go."""

    def __init__(self) -> None:
        self.answered, self.touched, self.may_load = 0, [], asyncio.Event()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.answered += 1

    async def touch(self, name: str) -> None:
        self.touched.append(name)
        await self.may_load.wait()
        if name == "broken":
            raise refusals.not_ready()


def ask(name: str) -> dict[str, Any]:
    return {"type": "http", "headers": [(HEADER, name.encode())]}


async def requests(asked: Asked, *names: str) -> Touching:
    app = Touching(asked.app, asked.touch, {"a", "b", "broken"})
    for name in names:
        await asyncio.wait_for(app(ask(name), None, None), 5)
        await asyncio.sleep(0)
    return app


def test_a_load_is_never_in_an_answers_way() -> None:
    """Serve loads one model at a time: requests waited for others' loads, past their deadlines."""

    async def main() -> None:
        asked = Asked()
        app = await requests(asked, "a", "a", "b", "first", "nobody", "a")
        assert asked.answered == 6
        assert asked.touched == ["a", "b"]  # once while it loads, and only what may have to be loaded
        asked.may_load.set()
        await asyncio.sleep(0.01)
        await app(ask("a"), None, None)
        await asyncio.sleep(0.01)
        assert asked.touched == ["a", "b", "a"]
        assert app._touching == {}

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_is_the_apps_to_refuse() -> None:
    async def main() -> None:
        faults: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        asked = Asked()
        asked.may_load.set()
        app = await requests(asked, "broken", "broken")
        await asyncio.sleep(0.01)
        assert (asked.answered, asked.touched, app._touching, faults) == (2, ["broken", "broken"], {}, [])

    asyncio.run(main())
