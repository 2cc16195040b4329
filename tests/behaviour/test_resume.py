"""Streams that outlive their server: whole and equal to unbroken ones, or the error that there is without a resume."""

import asyncio
import gc
import gzip
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Final, get_args

import pytest
from hypothesis import settings

from edge import resuming
from edge.limits.admission import Permit
from edge.relay.delivered import Delivered, Interrupted
from edge.relay.terms import Attempt
from edge.resume.rules import NotResumed, Question
from edge.resume.said import Said
from edge.resume.seam import Seam
from edge.resuming import Resumption
from edge.simulator import speaking
from edge.simulator.behaviour import Behaviour, Dialect
from edge.simulator.questions import Ask
from edge.simulator.server import Simulator
from edge.upstream.tokenizer import Tokenizer
from edge.wire.http1 import Chunked
from tests.conftest import Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream, soon
from tests.profiles import DEEP
from tests.streams import chunk

MODEL = "public/m"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi there"}]
GREEDY: dict[str, Any] = {"model": MODEL, "stream": True, "temperature": 0}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: GREEDY | {"messages": MESSAGES},
    COMPLETIONS: GREEDY | {"prompt": "once upon"},
}
USAGE = {"stream_options": {"include_usage": True}}
CUTS: Final = 8  # of an engine in a mode, at any byte
CUTS_DEEP: Final = 100
_names = map(str, itertools.count())


@dataclass
class Told:
    """What a client got, and what the edge recorded of it."""

    body: bytes
    whole: bool
    record: dict[str, Any]
    line: dict[str, Any]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        lines = self.body.split(b"\n\n")
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]

    @property
    def answer(self) -> tuple[Any, ...]:
        """What must be equal: text, names, beginning, end and usage."""
        choices = [choice for each in self.chunks for choice in each.get("choices", ())]
        deltas = [choice.get("delta", choice) for choice in choices]
        return (
            "".join(delta.get("content") or delta.get("text") or "" for delta in deltas),
            "".join(delta.get("reasoning") or delta.get("reasoning_content") or "" for delta in deltas),
            {(each.get("id"), each.get("created"), each.get("model")) for each in self.chunks},
            sum("role" in delta for delta in deltas),
            [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
            [each["usage"] for each in self.chunks if each.get("usage") and not each["choices"]],
            self.body.endswith(b"data: [DONE]\n\n"),
            [each["error"] for each in self.chunks if "error" in each],
        )

    @property
    def bill(self) -> tuple[Any, ...]:
        names = (
            "end",
            "prompt_tokens",
            "completion_tokens",
            "reasoning_tokens",
            "cached_tokens",
            "usage_source",
            "status",
        )
        return tuple(self.record[name] for name in names)

    def begins(self, whole: "Told") -> bool:
        """Whether its events are the beginning of the whole answer."""
        events, _, _ = self.body.rpartition(b"\n\n")
        begun = replace(self, body=events)
        return all(said.startswith(part) for part, said in zip(begun.answer[:2], whole.answer[:2], strict=True))

    @property
    def is_broken(self) -> bool:
        """Whether it ends as a stream does that breaks today."""
        return self.record["end"] == "upstream_cut" and (not self.whole or b"upstream_disconnected" in self.body)


@dataclass
class Scene:
    """An edge before two model servers of one model."""

    edge: Edge
    simulators: list[Simulator]

    async def waits_for_a_silent_sibling(self) -> RawClient:
        """Return a client whose stream broke, while the sibling that was asked says nothing."""
        first, second = self.simulators
        first.behaviour = Behaviour(text="prompt", tokens=13, fault="cut", after=5)
        second.behaviour = Behaviour(text="prompt", tokens=13, fault="stall", after=-1)
        client = await self.edge.connect()
        client.send(self.edge.request(BODIES[CHAT]))
        await soon(second.wait_for(lambda: second.active))
        return client

    async def ask(self, path: str = CHAT, *, version: str = "1.1", **body: Any) -> Told:
        client = await self.edge.connect()
        client.send(self.edge.request(BODIES[path] | body, path=path, version=version))
        try:
            _, _, content = await soon(client.response())
            whole = True
        except asyncio.IncompleteReadError as cut:
            content, whole = cut.partial, False
        except ConnectionResetError:  # as a client of HTTP/1.0 is told that an answer is not whole
            content, whole = b"", False
        client.close()
        await self.edge.idle()
        return Told(content, whole, self.edge.records()[-1], (await self.edge.log())[-1])

    async def broken(self, path: str = CHAT, *, after: int = 5, after_bytes: int = 0, **body: Any) -> Told:
        """Ask for a stream whose first server dies behind so many frames and bytes."""
        fault = {"fault": "cut", "after": after, "after_bytes": after_bytes, "once": next(_names)}
        return await self.ask(path, **body | {"simulate": body.get("simulate", {}) | fault})


StartScene = Callable[..., Awaitable[Scene]]


@pytest.fixture(autouse=True)
def _time_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on how fast the machine is."""
    monkeypatch.setattr(resuming, "_COUNTING_S", 60.0)


@pytest.fixture
async def scene(start_edge: StartEdge) -> AsyncIterator[StartScene]:
    """Start an edge before model servers of one kind."""
    async with AsyncExitStack() as stack:

        async def start(
            mode: str,
            *,
            engine: Dialect = "vllm",
            pool: str = "",
            route: str = "metered = true",
            count: int = 2,
            beside: tuple[str, ...] = (),
            **more: Any,
        ) -> Scene:
            simulators = []
            for _ in range(count):
                given = {"text": "prompt", "tokens": 13} | more
                simulators.append(Simulator(Behaviour(dialect=engine, **given)))
                await simulators[-1].start()
                stack.push_async_callback(simulators[-1].close)
            urls = ", ".join(f'"{url}"' for url in (*(each.url for each in simulators), *beside))
            edge = await start_edge(
                f'[pools.p]\nendpoints = [{urls}]\nbalance = "round-robin"\nengine = "{engine}"\nresume = "{mode}"\n'
                f'retry_budget = 1.0\n{pool}\n[routes."public/*"]\npool = "p"\n{route}\n'
            )
            return Scene(edge, simulators)

        yield start


@pytest.mark.parametrize(
    ("mode", "engine", "path", "more"),
    [
        ("replay", "vllm", CHAT, {}),
        ("replay", "sglang", COMPLETIONS, {"seed": 3, "temperature": 1}),
        ("replay", "llamacpp", CHAT, {"n": 2}),
        ("replay", "openai", CHAT, {"max_tokens": 9}),
        ("content", "vllm", CHAT, {"max_tokens": 9}),
        ("content", "sglang", CHAT, {}),
        ("content", "llamacpp", CHAT, {"max_completion_tokens": 9}),
        ("content", "vllm", COMPLETIONS, {"prompt": [1, 2, 3]}),
        ("content", "sglang", COMPLETIONS, {"max_tokens": 9}),
        ("content", "llamacpp", COMPLETIONS, {}),
        ("auto", "vllm", CHAT, {"simulate": {"uneven": True}}),
    ],
)
async def test_a_stream_that_breaks_behind_any_frame_is_whole(
    scene: StartScene, mode: str, engine: Dialect, path: str, more: dict[str, Any]
) -> None:
    """Without usage shown and with it, which the edge hides or shows as of an unbroken one."""
    running = await scene(mode, engine=engine)
    assert await resumed_behind_each_frame(running, path, more) >= 16


async def resumed_behind_each_frame(running: Scene, path: str, more: dict[str, Any]) -> int:
    """Break a stream behind each frame, and return how many went on: all but the last are whole."""
    wholes = [await running.ask(path, **more, **shown) for shown in ({}, USAGE)]
    frames = len(wholes[0].body.split(b"\n\n"))
    resumed = 0
    for after in range(1, frames + 1):
        for whole, shown in zip(wholes, ({}, USAGE), strict=True):
            told = await running.broken(path, after=after, **more, **shown)
            if told.is_broken:
                at_its_end = told.answer[:2] == ("", whole.answer[1]) != ("", "")  # of a thought, and no more is known
                assert told.line["resume"] in ("finished", "at_limit", "unequal" if at_its_end else "ignored")
                assert told.body.startswith(whole.body[:100])
            else:
                assert told.answer == whole.answer
                assert told.bill[:4] == whole.bill[:4]
                assert told.line["resume"] in ("resumed", "finished", None)
            resumed += told.line["resume"] == "resumed"
    await running.edge.consistent()
    return resumed


@pytest.mark.parametrize(
    ("mode", "engine", "kind"),
    [
        ("content", "vllm", {}),
        ("content", "vllm", {"uneven": True}),
        ("content", "sglang", {}),
        ("auto", "sglang", {"uneven": True}),
        ("replay", "llamacpp", {}),
    ],
)
async def test_a_stream_that_breaks_within_its_thoughts_or_behind_them_is_whole(
    scene: StartScene, mode: str, engine: Dialect, kind: dict[str, Any]
) -> None:
    running = await scene(mode, engine=engine, thinks=6, **kind)
    assert len((await running.ask()).answer[1].split()) > 3
    assert await resumed_behind_each_frame(running, CHAT, {}) >= 12


@pytest.mark.parametrize(
    ("mode", "engine"),
    [
        (mode, engine)
        for mode in ("replay", "content", "auto")
        for engine in get_args(Dialect)
        if (mode, engine) != ("content", "openai")
    ],
)
async def test_a_stream_that_breaks_at_any_byte_is_whole_or_breaks_as_today(
    scene: StartScene, mode: str, engine: Dialect
) -> None:
    """Without thoughts, within them and behind them; behind an event and within one; to clients of HTTP/1.0 too.

    And no third thing, whatever became of it: text, thoughts, names, usage and record are those of the whole answer, or
    its beginning has the error behind it, and the log a word that says why.
    """
    running = await scene(mode, engine=engine)
    chance, wholes = random.Random(f"{mode} {engine}"), dict[Any, Told]()
    for _ in range(CUTS_DEEP if settings.get_current_profile_name() == DEEP else CUTS):
        thinks, uneven = chance.choice((0, 4, 9, 13)), chance.random() < 0.3
        shown, version = chance.choice(({}, USAGE)), chance.choice(("1.0", "1.1", "1.1"))
        for simulator in running.simulators:
            simulator.behaviour = Behaviour(dialect=engine, text="prompt", tokens=13, thinks=thinks, uneven=uneven)
        key = thinks, uneven, len(shown), version
        whole = wholes[key] = wholes.get(key) or await running.ask(version=version, **shown)
        after = chance.randrange(1, whole.body.count(b"data: "))
        after_bytes = chance.choice((0, chance.randrange(300)))
        told = await running.broken(after=after, after_bytes=after_bytes, version=version, **shown)
        if told.is_broken:
            assert told.begins(whole)
            assert bool(told.line["resume"]) == (b"upstream_disconnected" in told.body)
        else:
            assert (told.answer, told.bill[:4]) == (whole.answer, whole.bill[:4])
            assert told.line["resume"] in ("resumed", "finished", None)
        print(mode, engine, "broken" if told.is_broken else "equal", told.line["resume"], sep="\t")
    await running.edge.consistent()


async def test_the_record_has_both_endpoints_and_what_each_token_cost_once(scene: StartScene) -> None:
    running = await scene("content")
    told = await running.broken()
    record, line = told.record, told.line
    assert {record["resumed_from"], record["endpoint"]} == {
        each.url.removeprefix("http://") for each in running.simulators
    }
    assert (record["resumes"], record["retries"], line["resumes"], line["resume"]) == (1, 1, 1, "resumed")
    assert [each["endpoint"] for each in line["attempts"]] == [record["resumed_from"], record["endpoint"]]
    second = record["resumed_usage"]
    assert (
        second["prompt_tokens"] + second["completion_tokens"] == record["prompt_tokens"] + record["completion_tokens"]
    )
    assert (record["completion_tokens"], second["completion_tokens"]) == (13, 9)
    assert "resumes" not in (await running.ask()).record


async def test_what_lacks_nothing_but_its_last_event_is_ended_in_order(scene: StartScene) -> None:
    """Nobody else is asked."""
    running = await scene("content")
    for shown, version in ((USAGE, "1.1"), ({}, "1.1"), (USAGE, "1.0")):
        whole = await running.ask(version=version, **shown)
        told = await running.broken(after=15, version=version, **shown)
        assert (told.answer, told.bill) == (whole.answer, whole.bill)
        assert (told.line["resume"], told.line["resumes"], told.record["end"]) == ("finished", 0, "complete")


async def test_a_limit_is_charged_what_is_recorded(scene: StartScene, monkeypatch: pytest.MonkeyPatch) -> None:
    charged: list[tuple[int, ...]] = []
    charge = Permit.charge

    def noting(permit: Permit, *counts: int) -> None:
        charged.append(counts)
        charge(permit, *counts)

    monkeypatch.setattr(Permit, "charge", noting)
    running = await scene("content", route='metered = true\nlimit = "l"\n[limits.l]\ntokens_per_minute = 10000')
    for ask in (running.ask, running.broken):
        record = (await ask()).record
        assert charged[-1][:2] == (record["prompt_tokens"] + record["completion_tokens"], record["completion_tokens"])
    assert charged[0] == charged[1]
    assert len(charged) == 2


@pytest.mark.parametrize(
    ("reason", "engine", "path", "more"),
    [
        ("choices", "sglang", CHAT, {"n": 2}),
        ("choices", "vllm", COMPLETIONS, {"prompt": ["a", "b"]}),
        ("echo", "vllm", COMPLETIONS, {"echo": True}),
        ("echo", "vllm", COMPLETIONS, {"suffix": "x"}),
        ("prefill", "vllm", CHAT, {"messages": [*MESSAGES, {"role": "assistant", "content": "So"}]}),
        ("prefill", "vllm", CHAT, {"add_generation_prompt": False}),
        ("tools", "vllm", CHAT, {"tool_choice": "required"}),
        ("tools", "vllm", CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ("penalties", "vllm", CHAT, {"frequency_penalty": 0.5}),
        ("penalties", "llamacpp", CHAT, {"presence_penalty": 1}),
        ("penalties", "sglang", CHAT, {"repetition_penalty": 1.1}),
        ("stop", "vllm", CHAT, {"stop": ["x"]}),
        ("grammar", "vllm", CHAT, {"response_format": {"type": "json_object"}}),
        ("grammar", "sglang", CHAT, {"regex": "a+"}),
        ("media", "vllm", CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ("seeded", "vllm", CHAT, {"temperature": 1, "seed": 4}),
        ("prompt", "vllm", CHAT, {"truncate_prompt_tokens": 9}),
        ("logprobs", "vllm", COMPLETIONS, {"logprobs": 1}),
    ],
)
async def test_what_cannot_be_gone_on_with_ends_with_the_error_of_today(
    scene: StartScene, reason: str, engine: Dialect, path: str, more: dict[str, Any]
) -> None:
    running = await scene("content", engine=engine, pool="allow_members = []")
    told = await running.broken(path, **more)
    assert told.is_broken
    assert told.line["resume"] == reason
    assert told.line["resumes"] == 0
    assert told.record["completion_tokens"] >= 3
    await running.edge.consistent()


@pytest.mark.parametrize(
    ("reason", "engine", "kind"),
    [
        ("ignored", "vllm", {"ignores_flags": True}),
        ("ignored", "vllm", {"ignores_flags": True, "thinks": 9}),
        ("ignored", "sglang", {"ignores_flags": True}),
        ("ignored", "llamacpp", {"ignores_flags": True}),
        ("reasoning", "llamacpp", {"thinks": 2}),
        ("reasoning", "llamacpp", {"thinks": 9}),
    ],
)
async def test_a_server_that_would_begin_anew_is_found_out_before_the_client_sees_it(
    scene: StartScene, reason: str, engine: Dialect, kind: dict[str, Any]
) -> None:
    running = await scene("content", engine=engine, **kind)
    whole = await running.ask()
    told = await running.broken()
    assert told.is_broken
    assert (told.line["resume"], told.line["resumes"]) == (reason, reason == "ignored")
    for said, broken in zip(whole.answer[:2], told.answer[:2], strict=True):
        assert said.startswith(broken)
    assert told.record["completion_tokens"] >= 3


async def test_what_vllms_template_changes_is_asked_by_its_ids(scene: StartScene) -> None:
    running = await scene("content", trims=True)
    assert await resumed_behind_each_frame(running, CHAT, {}) >= 20


async def test_ids_that_are_another_text_than_what_was_said_are_not_asked(
    scene: StartScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await scene("content", thinks=6)
    tokenized = speaking.tokenized

    def turned(dialect: Dialect, path: str, ask: Ask, behaviour: Behaviour) -> list[int]:
        ids = tokenized(dialect, path, ask, behaviour)
        return ids if ask.messages else ids[::-1]

    monkeypatch.setattr(speaking, "tokenized", turned)
    told = await running.broken()
    assert (told.is_broken, told.line["resume"], told.line["resumes"]) == (True, "tokenizer", 0)


@pytest.mark.parametrize("more", [{"reasoning_effort": "low"}, {"documents": [{"text": "a"}]}])
async def test_a_prompt_that_vllms_tokenizer_does_not_know_is_not_asked_by_its_ids(
    scene: StartScene, more: dict[str, Any]
) -> None:
    running = await scene("content", thinks=6, pool="allow_members = []")
    told = await running.broken(**more)
    assert (told.is_broken, told.line["resume"], told.line["resumes"]) == (True, "prompt", 0)


async def test_an_answer_without_the_thoughts_that_its_prompt_opens_is_not_gone_on_with(scene: StartScene) -> None:
    """Its model ended them at once, and the parser kept that; or there is no parser."""
    for engine in ("vllm", "sglang"):
        running = await scene("content", engine=engine)
        running.simulators[1].behaviour = Behaviour(dialect=engine, text="prompt", tokens=13, thinks=6)
        await running.ask()
        running.simulators[0].behaviour = Behaviour(dialect=engine, text="prompt", tokens=13, fault="cut", after=5)
        await running.ask()
        told = await running.ask()
        assert (told.is_broken, told.line["resume"]) == (True, "reasoning")


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        ("sglang", {"stop": ["x"]}),
        ("llamacpp", {"response_format": {"type": "json_object"}}),
        ("vllm", {"response_format": {"type": "text"}, "tool_choice": "auto", "frequency_penalty": 0}),
        ("vllm", {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}),
        ("vllm", {"logprobs": True}),
    ],
)
async def test_what_looks_like_a_refusal_and_is_none_goes_on(
    scene: StartScene, engine: Dialect, more: dict[str, Any]
) -> None:
    running = await scene("content", engine=engine)
    assert (await running.broken(**more)).answer == (await running.ask(**more)).answer


async def test_a_sampled_answer_is_not_replayed_unless_nothing_was_said(scene: StartScene) -> None:
    running = await scene("replay")
    told = await running.broken(temperature=1)
    assert told.is_broken
    assert told.line["resume"] == "sampled"
    told = await running.broken(temperature=1, after=1)
    assert told.line["resume"] == "resumed"
    assert told.answer[3:5] == (1, ["stop"])


async def test_auto_takes_content_where_it_is_exact_and_replay_where_it_is_not(scene: StartScene) -> None:
    running = await scene("auto")
    for more, second_tokens in [({}, 9), ({"stop": ["x"]}, 13), ({"seed": 3, "temperature": 1}, 13)]:
        told = await running.broken(**more)
        assert told.answer == (await running.ask(**more)).answer
        assert told.record["resumed_usage"]["completion_tokens"] == second_tokens
    assert (await running.broken(temperature=1)).record["resumed_usage"]["completion_tokens"] == 9  # as fair a sample


async def test_so_many_tokens_are_generated_again_and_no_more(scene: StartScene) -> None:
    running = await scene("replay", pool="resume_at_most = 5")
    assert (await running.broken(after=6)).line["resume"] == "resumed"
    assert (await running.broken(after=7)).line["resume"] == "too_long"


async def test_another_answer_is_an_error_and_no_fault_of_who_gave_it(scene: StartScene) -> None:
    running = await scene("replay")
    for at, simulator in enumerate(running.simulators):
        simulator.behaviour = Behaviour(text="prompt", tokens=13, weights=at)
    told = await running.broken()
    assert told.is_broken
    assert (told.line["resume"], told.record["completion_tokens"]) == ("unequal", 4)
    assert sum(len(each.faults or ()) for each in running.edge.server.endpoints.states()) == 1
    assert [each["outcome"] for each in told.line["attempts"]] == ["upstream_cut", "unequal"]
    assert told.record["retries"] == 1


async def test_an_error_of_the_sibling_within_its_stream_is_a_fault_of_it(scene: StartScene) -> None:
    running = await scene("replay")
    await running.ask()
    running.simulators[1].behaviour = Behaviour(text="prompt", tokens=13, fault="cut", after=5)
    running.simulators[0].behaviour = Behaviour(text="prompt", tokens=13, fault="error_mid", after=1)
    told = await running.ask()
    assert told.is_broken
    assert told.line["resume"] == "failed"
    assert [len(each.faults or ()) for each in running.edge.server.endpoints.states()] == [1, 1]


async def test_a_sibling_that_is_out_is_asked_rather_than_none(scene: StartScene) -> None:
    running = await scene("replay")
    first, second = running.edge.server.endpoints.states()
    assert (await running.ask()).record["endpoint"] == first.authority
    assert (await running.ask()).record["endpoint"] == second.authority
    for _ in range(5):
        now = second.connections.loop.time()
        second.health.unreachable(now, second.health.begin(""), "")
    assert not second.health.admits(now)
    told = await running.broken()
    assert (told.line["resume"], told.record["endpoint"]) == ("resumed", second.authority)


async def test_a_pool_of_one_ends_as_today(scene: StartScene) -> None:
    running = await scene("auto", count=1)
    told = await running.broken()
    assert told.is_broken
    assert told.line["resume"] == "no_member"


async def test_a_second_break_is_the_error_of_today(scene: StartScene) -> None:
    running = await scene("content", count=3)
    for simulator in running.simulators:
        simulator.behaviour = Behaviour(text="prompt", tokens=13, fault="cut", after=5)
    told = await running.ask()
    assert told.is_broken
    assert (told.line["resumes"], told.line["resume"], told.record["retries"]) == (1, "resumed", 1)
    assert told.record["completion_tokens"] == 8  # four of each


async def test_a_sibling_that_refuses_at_once_leaves_the_stream_to_a_third(scene: StartScene) -> None:
    running = await scene("replay", count=3)
    whole = await running.ask()
    running.simulators[1].behaviour = Behaviour(text="prompt", tokens=13, fault="cut", after=5)
    running.simulators[2].behaviour = Behaviour(fault="error", status=503)
    told = await running.ask()
    assert told.answer == whole.answer
    assert told.record["retries"] == 2


@pytest.mark.parametrize("status", [0, 404, 500, 503])
async def test_a_sibling_that_fails_to_count_tokens_leaves_the_stream_to_a_third(
    scene: StartScene, status: int
) -> None:
    """And what it showed counts in its health: no connection (0), or an error of its own."""
    running = await scene("content", count=3)
    whole = await running.ask()
    first, second = running.simulators[1:]
    first.behaviour = Behaviour(text="prompt", tokens=13, fault="cut", after=5)
    names = [each.url.removeprefix("http://") for each in running.simulators]
    if status:
        second.behaviour = Behaviour(fault="error", status=status)
    else:
        await second.close()
    told = await running.ask()
    assert told.answer == whole.answer
    assert (told.record["endpoint"], told.record["resumed_from"]) == (names[0], names[1])
    assert (told.record["retries"], told.line["resume"]) == (2, "resumed")
    outcome = "upstream_error" if status else "connect_refused"
    tries = [(each["endpoint"], each["outcome"], each["status"]) for each in told.line["attempts"]]
    assert tries == [(names[1], "upstream_cut", 200), (names[2], outcome, status), (names[0], "complete", 200)]
    health = list(running.edge.server.endpoints.states())[2].health
    assert health.is_tainted == (status != 404)  # which may be all that a gateway lets pass


async def test_without_a_third_the_tokenizer_is_why_and_with_another_way_no_reason(scene: StartScene) -> None:
    for mode, resume in (("content", "tokenizer"), ("auto", "resumed")):
        running = await scene(mode)
        for simulator in running.simulators:
            simulator.behaviour = Behaviour(text="prompt", tokens=13, served=(MODEL,))
        await running.ask()
        running.simulators[1].behaviour = Behaviour(text="prompt", tokens=13, fault="cut", after=5)
        running.simulators[0].behaviour = Behaviour(dialect="openai", text="prompt", tokens=13)
        told = await running.ask()
        assert told.line["resume"] == resume


async def test_a_sibling_that_was_asked_nothing_stands_nowhere(scene: StartScene) -> None:
    running = await scene("content", engine="llamacpp", thinks=1)
    told = await running.broken()
    first, second = (each.url.removeprefix("http://") for each in running.simulators)
    assert told.line["resume"] == "reasoning"
    assert (told.record["endpoint"], told.record["retries"], told.line["endpoint"]) == (first, 0, first)
    assert [(each["endpoint"], each["outcome"]) for each in told.line["attempts"]] == [(first, "upstream_cut")]
    text = (await running.edge.server.metrics.render()).decode()
    assert f'edge_upstream_requests_total{{pool="p",endpoint="{first}",status="200",outcome="upstream_cut"}} 1' in text
    assert f'edge_upstream_requests_total{{pool="p",endpoint="{second}"' not in text


async def test_a_sibling_that_is_silent_gives_back_all_when_the_client_leaves(scene: StartScene) -> None:
    running = await scene("replay")
    client = await running.waits_for_a_silent_sibling()
    client.abort()
    await soon(running.simulators[1].wait_for(lambda: not running.simulators[1].active))
    await running.edge.idle()
    record = running.edge.records()[-1]
    assert (record["end"], record["completion_tokens"], record["resumes"]) == ("client_gone", 4, 1)
    assert (await running.edge.log())[-1]["resume"] == "left"
    await running.edge.consistent()


@pytest.fixture
async def counting(start_edge: StartEdge, start_upstream: StartUpstream) -> tuple[Edge, Any]:
    """An edge before two servers that die behind a token, and whose tokenizers never answer; the second one."""

    async def dies_then_hangs(connection: ScriptedConnection) -> None:
        if b"/tokenize" in connection.request:
            await connection.reader.read()  # until it is gone
            return
        frames = (b'{"role":"assistant","content":""}', b'{"content":"a"}')
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        events = [b'data: {"choices":[{"index":0,"delta":%b,"finish_reason":null}]}\n\n' % each for each in frames]
        await connection.send(head, *map(chunk, events))
        connection.writer.close()

    upstreams = [await start_upstream(dies_then_hangs) for _ in range(2)]
    urls = ", ".join(f'"{each.url}"' for each in upstreams)
    routes = f'[pools.p]\nendpoints = [{urls}]\nbalance = "round-robin"\nresume = "content"\n'
    return await start_edge(routes + '[routes."public/*"]\npool = "p"\n'), upstreams[1]


async def test_a_client_that_leaves_while_tokens_are_counted_gives_back_all(counting: tuple[Edge, Any]) -> None:
    edge, second = counting
    client = await edge.connect()
    client.send(edge.request(BODIES[CHAT]))
    await soon(second.asked.wait())
    client.abort()
    await soon(second.gone.wait())
    await edge.idle()
    record = edge.records()[-1]
    assert (record["end"], record["completion_tokens"]) == ("client_gone", 1)
    assert (await edge.log())[-1]["resume"] == "left"
    await edge.consistent()


async def test_a_stop_of_the_edge_while_tokens_are_counted_ends_with_its_error(counting: tuple[Edge, Any]) -> None:
    edge, second = counting
    client = await edge.connect()
    client.send(edge.request(BODIES[CHAT]))
    await soon(second.asked.wait())
    for each in edge.server.clients.clients:
        each.answering.cut()  # type: ignore[union-attr]
    _, _, body = await soon(client.response())
    assert b"The edge had to restart" in body
    await edge.idle()
    record = edge.records()[-1]
    assert (record["end"], record["completion_tokens"]) == ("drained", 1)
    assert (await edge.log())[-1]["resume"] is None
    await edge.consistent()


async def test_a_tokenizer_that_does_not_answer_in_time_ends_the_stream(
    counting: tuple[Edge, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "_COUNTING_S", 0.05)
    told = await Scene(counting[0], []).ask()
    assert (told.line["resume"], told.is_broken) == ("tokenizer", True)


@pytest.fixture
async def third(scene: StartScene, start_upstream: StartUpstream) -> tuple[Scene, Told, list[str]]:
    """An edge before a server that dies next, one whose tokenizer is silent, and a third one; their names.

    The answer is whole, of the third.
    """

    async def is_silent(connection: ScriptedConnection) -> None:
        await connection.reader.read()

    silent = await start_upstream(is_silent)
    running = await scene("content", beside=(silent.url,), route='metered = true\nheartbeat = "20ms"')
    goes_on, dies = running.simulators
    whole = await running.ask()
    dies.behaviour = Behaviour(text="prompt", tokens=13, fault="cut", after=5)
    return running, whole, [each.removeprefix("http://") for each in (dies.url, silent.url, goes_on.url)]


async def test_a_sibling_whose_tokenizer_is_silent_leaves_the_stream_to_a_third(
    third: tuple[Scene, Told, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the time that all of them have: half of it for the one, the rest for the other."""
    running, whole, names = third
    given: list[float] = []
    counts_until = Resumption._counts_until

    def shorter_for_the_first(self: Resumption) -> float:
        now = asyncio.get_running_loop().time()
        given.append(counts_until(self) - now)
        return now + (given[-1] if len(given) > 1 else 0.02)

    monkeypatch.setattr(Resumption, "_counts_until", shorter_for_the_first)
    told = await running.ask()
    assert told.answer == whole.answer
    tries = [(each["endpoint"], each["outcome"]) for each in told.line["attempts"]]
    assert tries == list(zip(names, ("upstream_cut", "no_answer", "complete"), strict=True))
    assert (told.line["resume"], told.record["resumes"], told.record["retries"]) == ("resumed", 1, 2)
    first, second = given
    assert first == pytest.approx(resuming._COUNTING_S / 2)
    assert resuming._COUNTING_S / 2 < second < resuming._COUNTING_S
    await running.edge.consistent()


async def test_without_a_third_a_silent_tokenizer_leaves_its_server_to_be_asked_in_another_way(
    scene: StartScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "_COUNTING_S", 0.02)
    never = asyncio.Event()
    monkeypatch.setattr(Tokenizer, "ask", lambda *_: never.wait())
    running = await scene("auto")
    whole, told = await running.ask(), await running.broken()
    assert told.answer == whole.answer
    assert (told.line["resume"], told.record["resumed_usage"]["completion_tokens"]) == ("resumed", 13)


async def test_heartbeats_go_on_while_tokens_are_counted(third: tuple[Scene, Told, list[str]]) -> None:
    running, _, names = third
    client = await running.edge.connect()
    client.send(running.edge.request(BODIES[CHAT]))
    for _ in range(3):
        await soon(client.reader.readuntil(b": keep-alive\n\n"))
    client.abort()
    await running.edge.idle()
    record, line = running.edge.records()[-1], (await running.edge.log())[-1]
    assert (record["end"], line["resume"], line["endpoint"]) == ("client_gone", "left", names[0])
    await running.edge.consistent()


async def test_a_stop_of_the_edge_ends_a_resume_with_its_error(scene: StartScene) -> None:
    running = await scene("replay")
    client = await running.waits_for_a_silent_sibling()
    for each in running.edge.server.clients.clients:
        each.answering.cut()  # type: ignore[union-attr]
    _, _, body = await soon(client.response())
    assert b"The edge had to restart" in body
    await running.edge.idle()
    assert running.edge.records()[-1]["end"] == "drained"


async def test_heartbeats_go_on_while_the_sibling_reads(scene: StartScene) -> None:
    running = await scene("replay", route='heartbeat = "50ms"')
    whole = await running.ask()
    running.simulators[1].behaviour = Behaviour(text="prompt", tokens=13, fault="cut", after=5)
    running.simulators[0].behaviour = Behaviour(text="prompt", tokens=13, ttft_ms=400)
    told = await running.ask()
    assert b": keep-alive\n\n" in told.body
    assert told.answer == whole.answer


@pytest.mark.parametrize("mode", ["replay", "content"])
async def test_a_server_that_dies_behind_heartbeats_and_before_its_first_token_is_gone_on_with(
    scene: StartScene, mode: str
) -> None:
    running = await scene(mode, route='heartbeat = "50ms"')
    whole = await running.ask(temperature=1, seed=3)
    running.simulators[1].behaviour = Behaviour(text="prompt", tokens=13, fault="stall", after=-1)
    client = await running.edge.connect()
    client.send(running.edge.request(BODIES[CHAT] | {"temperature": 1, "seed": 3}))
    await soon(client.reader.readuntil(b": keep-alive\n\n"))
    await running.simulators[1].close()
    rest = await soon(client.reader.readuntil(b"0\r\n\r\n"))
    payload: list[bytes] = []
    Chunked().scan(rest.removeprefix(b"\r\n"), payload)
    assert Told(b"".join(payload), True, {}, {}).answer == whole.answer
    await running.edge.idle()
    record, line = running.edge.records()[-1], (await running.edge.log())[-1]
    assert (record["end"], record["resumes"], line["resume"], line["retries"]) == ("complete", 1, "resumed", 1)
    assert (record["prompt_tokens"], record["completion_tokens"]) == whole.bill[1:3]


async def test_what_a_server_refuses_behind_heartbeats_is_asked_of_nobody_else(scene: StartScene) -> None:
    running = await scene("replay", route='heartbeat = "50ms"')
    running.simulators[0].behaviour = Behaviour(fault="error", status=400, ttft_ms=120)
    told = await running.ask()
    assert (told.record["end"], told.record["retries"], told.line["resume"]) == ("upstream_error", 0, None)
    assert b": keep-alive" in told.body


async def test_clients_of_http_1_0_and_echoed_names_go_on(scene: StartScene) -> None:
    running = await scene("content", route='model = "other"\nmodel_echo = true')
    whole = await running.ask(version="1.0")
    assert {each["model"] for each in whole.chunks} == {MODEL}
    for after in (1, 5):
        assert (await running.broken(version="1.0", after=after)).answer == whole.answer


async def test_a_long_stream_is_let_go_of_and_breaks_as_today(scene: StartScene) -> None:
    running = await scene("replay", pool='resume_memory = "20KiB"', tokens=200)
    assert (await running.broken(after=20)).line["resume"] == "resumed"
    told = await running.broken(after=150)
    assert (told.is_broken, told.line["resume"]) == (True, None)
    await running.edge.consistent()


async def test_past_its_bound_a_stream_keeps_no_body_either(scene: StartScene) -> None:
    running = await scene("replay", pool='resume_memory = "20KiB"', tokens=200)
    for after, is_kept in ((20, True), (150, False)):
        client = await running.edge.connect()
        stalled = {"simulate": {"fault": "stall", "after": after}, "user": "x" * 1000}
        client.send(running.edge.request(BODIES[CHAT] | stalled))
        for _ in range(after):
            await soon(client.reader.readuntil(b"data: "))
        assert bool([each for each in alive(Attempt) if each.body]) == is_kept
        client.abort()
        await running.edge.idle()


async def test_one_broken_stream_is_read_at_a_time_while_others_are_answered(scene: StartScene) -> None:
    running = await scene("auto")
    whole = await running.ask()
    turn = running.edge.server.proxy._forwarder.long_body
    await turn.acquire()
    client = await running.edge.connect()
    client.send(running.edge.request(BODIES[CHAT] | {"simulate": {"fault": "cut", "after": 5, "once": next(_names)}}))
    await soon(waited_for(turn))
    _, _, content = await soon(running.edge.ask(BODIES[CHAT]))
    assert Told(content, True, {}, {}).answer == whole.answer
    turn.release()
    _, _, content = await soon(client.response())
    assert Told(content, True, {}, {}).answer == whole.answer


async def waited_for(lock: asyncio.Lock) -> None:
    while not lock._waiters:  # type: ignore[attr-defined]
        await asyncio.sleep(0)


def alive(*kinds: type) -> list[Any]:
    return [each for each in gc.get_objects() if isinstance(each, kinds)]


async def test_nothing_of_a_broken_stream_is_left_to_be_collected(scene: StartScene) -> None:
    """Whether it went on, was refused at once, late, or by its sibling."""
    kinds = (Attempt, Delivered, Interrupted, NotResumed, Question, Resumption, Said, Seam)
    for mode, kind, more, resume in (
        ("replay", {}, {}, "resumed"),
        ("content", {}, {}, "resumed"),
        ("replay", {}, {"temperature": 1}, "sampled"),
        ("content", {"engine": "llamacpp", "thinks": 1}, {}, "reasoning"),
        ("content", {"engine": "sglang", "ignores_flags": True}, {}, "ignored"),
        ("auto", {"count": 1}, {}, "no_member"),
    ):
        running = await scene(mode, **kind)
        gc.collect()
        gc.disable()
        try:
            assert (await running.broken(**more)).line["resume"] == resume
            assert alive(*kinds) == [], resume
        finally:
            gc.enable()


async def test_compressed_answers_break_as_today(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    async def sends(connection: ScriptedConnection) -> None:
        lines = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n"
        await connection.send(
            lines + b"transfer-encoding: chunked\r\n\r\n", chunk(gzip.compress(b"data: {}\n\n") + b"\n\n")
        )
        connection.writer.close()

    upstreams = [await start_upstream(sends) for _ in range(2)]
    urls = ", ".join(f'"{each.url}"' for each in upstreams)
    edge = await start_edge(f'[pools.p]\nendpoints = [{urls}]\nresume = "auto"\n[routes."public/*"]\npool = "p"\n')
    told = await Scene(edge, []).ask()
    assert (told.is_broken, told.line["resumes"]) == (True, 0)
    assert sum(len(each.requests) for each in upstreams) == 1


async def test_streams_that_break_at_once_share_nothing(scene: StartScene) -> None:
    running = await scene("auto")
    bodies = [BODIES[CHAT] | {"messages": [{"role": "user", "content": f"number {at}"}]} for at in range(3)]

    async def text(body: dict[str, Any]) -> tuple[Any, ...]:
        _, _, content = await soon(running.edge.ask(body))
        return Told(content, True, {}, {}).answer

    wholes = [await text(body) for body in bodies]
    fault = {"fault": "cut", "interval_ms": 2}
    broken = [body | {"simulate": fault | {"after": 2 + at, "once": next(_names)}} for at, body in enumerate(bodies)]
    assert await asyncio.gather(*map(text, broken)) == wholes
    await running.edge.consistent()


async def test_no_stream_is_cut_by_a_rolling_restart_of_its_servers(scene: StartScene) -> None:
    running = await scene("auto", count=3, tokens=30, interval_ms=15)
    whole = await running.ask()
    for simulator in running.simulators:
        clients = [await running.edge.connect() for _ in range(12)]
        for client in clients:
            client.send(running.edge.request(BODIES[CHAT]))
        for client in clients:
            assert (await soon(client.reader.readexactly(12))) == b"HTTP/1.1 200"
        port = simulator.port
        await simulator.close()
        for client in clients:
            rest = await soon(client.reader.readuntil(b"0\r\n\r\n"))
            payload: list[bytes] = []
            Chunked().scan(rest.partition(b"\r\n\r\n")[2], payload)
            assert Told(b"".join(payload), True, {}, {}).answer == whole.answer
        await simulator.start(port=port)
    await running.edge.idle()
    records = running.edge.records()
    assert {(each["end"], each["prompt_tokens"], each["completion_tokens"]) for each in records} == {whole.bill[:3]}
    assert sum(each.get("resumes", 0) for each in records) >= 2
    await running.edge.consistent()


async def test_a_stream_is_no_retry_any_longer_once_its_sibling_answers(scene: StartScene) -> None:
    running = await scene("replay")
    pool = running.edge.server.generation.pools["p"]
    first, second = running.simulators
    first.behaviour = Behaviour(text="prompt", tokens=13, fault="cut", after=5)
    second.behaviour = Behaviour(text="prompt", tokens=13, fault="stall", after=8)
    client = await running.edge.connect()
    client.send(running.edge.request(BODIES[CHAT]))
    for _ in range(8):
        await soon(client.reader.readuntil(b"data: "))
    assert (second.active, pool.retrying) == (1, 0)
    client.abort()
    await running.edge.idle()
    assert pool.retrying == 0


async def test_pools_that_do_not_resume_break_as_ever_and_keep_nothing(scene: StartScene) -> None:
    running = await scene("off")
    told = await running.broken()
    assert (told.is_broken, told.line["resume"]) == (True, None)


async def test_metrics_count_what_became_of_broken_streams(scene: StartScene) -> None:
    running = await scene("replay")
    await running.broken()
    await running.broken(temperature=1)
    text = (await running.edge.server.metrics.render()).decode()
    assert 'edge_resumes_total{route="public/*",outcome="resumed"} 1\n' in text
    assert 'edge_resumes_total{route="public/*",outcome="sampled"} 1\n' in text
