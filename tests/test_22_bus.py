"""Section 22: events reach watchers once they are on disk, each once and in order."""
import asyncio
import random

import pytest

import claudomator as c


def with_bus(tmp_path, body, events_before=0):
    """Run ``body(store, bus)`` in a loop with a real database that already has some events."""
    store = c.Store(str(tmp_path / "bus.db"))
    for n in range(events_before):
        store.append_event("note", "even" if n % 2 == 0 else "odd", n=n)

    async def main():
        store.attach(asyncio.get_running_loop())
        await asyncio.wait_for(body(store, c.Bus(store)), 10)
    try:
        asyncio.run(main())
    finally:
        store.close()


async def take(follower, count):
    """The first ``count`` events of a follower."""
    got = []
    while len(got) < count:
        got += await anext(follower)
    return got


def test_a_watcher_gets_what_it_missed_page_by_page_then_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "EVENT_PAGE", 7)

    async def body(store, bus):
        follower, rng, written = bus.follow(20), random.Random(16), 100

        async def write():
            nonlocal written
            while written < 400:
                for _ in range(rng.randint(1, 9)):
                    store.append_event("note", "odd", n=written)
                    written += 1
                await asyncio.sleep(0)
        writer = asyncio.create_task(write())
        got = await take(follower, 380)
        await writer
        got += await take(follower, written - 20 - len(got)) if written - 20 > len(got) else []
        assert [event["seq"] for event in got] == list(range(21, written + 1))
        assert [event["n"] for event in got] == list(range(20, written))
        await follower.aclose()
        assert not bus._watchers
    with_bus(tmp_path, body, events_before=100)


def test_without_since_only_new_events_come(tmp_path):
    async def body(store, bus):
        follower = bus.follow(None)
        first = asyncio.ensure_future(anext(follower))
        await asyncio.sleep(0)
        store.append_event("new", n=1)
        assert [event["kind"] for event in await first] == ["new"]
    with_bus(tmp_path, body, events_before=5)


def test_a_watcher_of_one_task_gets_that_task_alone(tmp_path):
    async def body(store, bus):
        follower = bus.follow(0, "odd")
        assert [event["n"] for event in await take(follower, 5)] == [1, 3, 5, 7, 9]
        waiting = asyncio.ensure_future(anext(follower))
        store.append_event("note", "even", n=10)
        await store.durable()
        await asyncio.sleep(0)
        assert not waiting.done()
        store.append_event("note", "odd", n=11)
        assert [event["n"] for event in await waiting] == [11]
    with_bus(tmp_path, body, events_before=10)


def test_an_event_is_published_only_after_it_is_durable(tmp_path):
    async def body(store, bus):
        seen = []
        bus.subscribe(seen.extend)
        store.append_event("note", n=1)
        assert seen == [] and store.events_since(0) == []
        await store.durable()
        assert [event["n"] for event in seen] == [1] == [event["n"] for event in store.events_since(0)]
    with_bus(tmp_path, body)


def test_an_undone_operation_publishes_nothing(tmp_path):
    async def body(store, bus):
        seen = []
        bus.subscribe(seen.extend)
        with pytest.raises(ZeroDivisionError), store.atomic():
            store.append_event("note", n=1)
            1 / 0
        store.append_event("note", n=2)
        await store.durable()
        assert [event["n"] for event in seen] == [2]
    with_bus(tmp_path, body)


def test_a_watcher_may_leave_while_it_is_told(tmp_path):
    async def body(store, bus):
        told = []

        def leaver(events):
            told.append("leaver")
            bus.unsubscribe(leaver)
        bus.subscribe(leaver)
        bus.subscribe(lambda events: told.append("other"))
        for _ in range(2):
            store.append_event("note")
            await store.durable()
        bus.unsubscribe(leaver)  # again: nothing happens
        assert sorted(told) == ["leaver", "other", "other"]
    with_bus(tmp_path, body)
