"""What each path asks for, and that the table of operations is whole."""

import pytest

from edge.metering.meters import Metering
from edge.operations import (
    ANTHROPIC_MODELS,
    HEALTH,
    MODELS,
    OPERATIONS,
    STORED_RESPONSE,
    UNKNOWN,
    UNKNOWN_MESSAGES,
    Asked,
    Reads,
    Reserves,
    asked_at,
    paths_of,
)
from edge.protocols import MESSAGES, OPENAI, RESPONSES

PATHS = paths_of(("classify",))


def asked(path: str) -> Asked:
    return asked_at(path, PATHS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_its_paths(name: str) -> None:
    operation = OPERATIONS[name]
    bases = [""] if operation.has_version else ["", "/v1", "/openai", "/openai/v1"]
    if operation.protocol is MESSAGES:
        bases += ["/anthropic", "/anthropic/v1"]
    for base in bases:
        assert asked(f"{base}/{name}") == Asked(operation, ("POST",))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_a_reader_of_its_usage_and_of_its_end(name: str) -> None:
    operation = OPERATIONS[name]
    assert Metering(operation).events().last_events == operation.last_events  # type: ignore[attr-defined]
    assert Metering(operation).document() is not None
    assert not operation.always_ends or operation.last_events
    assert bool(operation.last_events) == (operation.reads in (Reads.CHUNKS, Reads.MESSAGE, Reads.RESPONSE))
    assert (operation.reserves is Reserves.ANSWER) == bool(operation.last_events)
    assert operation.protocol in (OPENAI, MESSAGES, RESPONSES)


def test_counting_tokens_costs_none() -> None:
    operation = OPERATIONS["messages/count_tokens"]
    assert (operation.reads, operation.reserves) == (Reads.NOTHING, Reserves.NOTHING)


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/models/public/r1", "public/r1"),
        ("/models/public%2Fr1", "public%2Fr1"),
        ("/openai/v1/models/a", "a"),
        ("/openai/models/a", "a"),
        ("/anthropic/v1/models/a", "a"),
    ],
)
def test_path_of_a_model_names_it(path: str, model: str) -> None:
    operation = ANTHROPIC_MODELS if path.startswith("/anthropic") else MODELS
    assert asked(path) == Asked(operation, ("GET", "HEAD"), model=model)


@pytest.mark.parametrize("path", ["/models", "/v1/models", "/v1/models/", "/openai/v1/models", "/anthropic/v1/models"])
def test_models_are_listed_with_and_without_a_slash_at_the_end(path: str) -> None:
    operation = ANTHROPIC_MODELS if path.startswith("/anthropic") else MODELS
    assert asked(path) == Asked(operation, ("GET", "HEAD"))


@pytest.mark.parametrize(
    ("path", "operation", "model"),
    [
        ("/openai/deployments/public/r1/chat/completions", "chat/completions", "public/r1"),
        ("/openai/deployments/public%2Fr1/completions", "completions", "public%2Fr1"),
        ("/openai/deployments/m/images/generations", "images/generations", "m"),
        ("/openai/deployments/chat/chat/completions", "chat/completions", "chat"),
        ("/openai/deployments/m/responses", "responses", "m"),
    ],
)
def test_azures_path_names_the_model_as_its_deployment(path: str, operation: str, model: str) -> None:
    assert asked(path) == Asked(OPERATIONS[operation], ("POST",), model=model)


def test_azures_path_reaches_what_operators_add() -> None:
    assert asked("/openai/deployments/public/r1/classify").operation.name == "classify"


@pytest.mark.parametrize(
    ("path", "methods", "stored"),
    [
        ("/v1/responses/resp_1", ("GET", "DELETE"), "resp_1"),
        ("/responses/resp_1", ("GET", "DELETE"), "resp_1"),
        ("/openai/v1/responses/resp_1/cancel", ("POST",), "resp_1/cancel"),
        ("/v1/responses/resp_1/input_items", ("GET",), "resp_1/input_items"),
    ],
)
def test_path_of_a_response_names_it(path: str, methods: tuple[str, ...], stored: str) -> None:
    assert asked(path) == Asked(STORED_RESPONSE, methods, stored=stored)
    assert asked(path).response_id == "resp_1"


def test_operators_add_operations() -> None:
    assert asked("/v1/classify").operation.name == "classify"
    assert asked("/v1/classify").operation.reads is Reads.ANY
    assert paths_of().get("/v1/classify") is None


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/v1", "/v1/", "/v1/v1/models", "//v1/models", "/v1/chat/completions/", "/v1//chat/completions",
        "/V1/models", "/v1/modelsx", "/v2/embeddings", "/v1/v2/rerank",
        "/openai/deployments/m/messages", "/openai/deployments/m",
        "/v1/responses/compact", "/v1/responses/input_tokens",
        "/v1/responses/", "/v1/responses/a/b", "/v1/responses/a%2Fb", "/v1/responses/../x",
        "/anthropic/chat/completions", "/v1/health", "/classify/", "/v1/responses/" + "r" * 129,
    ],
)  # fmt: skip
def test_any_other_path_asks_for_nothing(path: str) -> None:
    unknown = UNKNOWN_MESSAGES if path.startswith("/anthropic") else UNKNOWN
    assert asked(path) == Asked(unknown, ())


def test_unknown_path_of_anthropics_api_is_refused_in_its_protocol() -> None:
    for path in ("/v1/messages/batches", "/messages/x", "/anthropic/v1/files", "/v1/v1/messages"):
        assert asked(path).operation.protocol is MESSAGES


def test_health_is_public() -> None:
    assert asked("/health") == Asked(HEALTH, ("GET", "HEAD"))
