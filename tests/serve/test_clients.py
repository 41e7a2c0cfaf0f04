"""Clients that people use, against the server with both parsers. Those that are not installed are skipped:

python -m pip install --group clients
"""

from __future__ import annotations

import json
from typing import Literal

import pytest
from pydantic import BaseModel

CAPITAL, PARIS = "What is the capital of France?", "The capital of France is Paris."
WEATHER, SUNNY = "What is the weather in Havana?", "It is 25 degrees and sunny in Havana."
SUM = "What is 47 + 8?"
FUNCTION = {
    "name": "get_weather",
    "description": "Weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
FOUND = json.dumps({"temperature": 25, "sky": "sunny"})
THINKING = {"chat_template_kwargs": {"thinking_option": "on"}}


class City(BaseModel):
    """A city; of a free text the demo model would not find the end."""

    city: Literal["Paris", "Rome", "Havana"]
    country: Literal["France", "Italy", "Cuba"]


@pytest.fixture
def url(assistant_server):
    return f"{assistant_server.url}/v1"


@pytest.fixture
def as_usual(url, monkeypatch):
    """What clients read from the environment."""
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")


# ---- openai ----------------------------------------------------------------------------------------------------


@pytest.fixture
def client(url):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=url, api_key="none", timeout=120)


def test_openai_chat(client):
    ask = {"model": "demo", "temperature": 0}
    said = client.chat.completions.create(messages=[{"role": "user", "content": CAPITAL}], **ask)
    assert said.choices[0].message.content == PARIS
    messages = [{"role": "user", "content": WEATHER}]
    message = client.chat.completions.create(messages=messages, tools=TOOLS, **ask).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Havana"})
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": FOUND}]
    assert client.chat.completions.create(messages=messages, tools=TOOLS, **ask).choices[0].message.content == SUNNY


def test_openai_chat_parsed(client):
    messages = [{"role": "user", "content": "Name a city."}]
    said = client.chat.completions.parse(model="demo", messages=messages, response_format=City, max_tokens=256)
    assert isinstance(said.choices[0].message.parsed, City)


def test_openai_chat_streamed(client):
    messages = [{"role": "user", "content": WEATHER}]
    with client.chat.completions.stream(model="demo", messages=messages, tools=TOOLS, temperature=0) as stream:
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and json.loads(call.function.arguments) == {"city": "Havana"}


def test_openai_responses(client):
    said = client.responses.create(model="demo", input=CAPITAL, temperature=0)
    assert said.output_text == PARIS and said.status == "completed"
    tools = [{"type": "function", **FUNCTION}]
    asked = [{"role": "user", "content": WEATHER}]
    said = client.responses.create(model="demo", input=asked, tools=tools, temperature=0)
    (call,) = [item for item in said.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Havana"})
    asked += [call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": FOUND}]
    assert client.responses.create(model="demo", input=asked, tools=tools, temperature=0).output_text == SUNNY


def test_openai_responses_streamed(client):
    with client.responses.stream(model="demo", input=CAPITAL, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == PARIS


# ---- anthropic -------------------------------------------------------------------------------------------------


@pytest.fixture
def messages_of(assistant_server):
    anthropic = pytest.importorskip("anthropic")
    return anthropic.Anthropic(base_url=assistant_server.url, api_key="none", timeout=120).messages


def test_anthropic(messages_of):
    # Its newer versions take no temperature by name.
    ask = {"model": "demo", "max_tokens": 128, "extra_body": {"temperature": 0}}
    said = messages_of.create(messages=[{"role": "user", "content": CAPITAL}], **ask)
    assert said.content[0].text == PARIS and said.stop_reason == "end_turn"
    tool = {"name": FUNCTION["name"], "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}
    asked = [{"role": "user", "content": WEATHER}]
    said = messages_of.create(messages=asked, tools=[tool], **ask)
    (call,) = [block for block in said.content if block.type == "tool_use"]
    assert (call.name, call.input, said.stop_reason) == ("get_weather", {"city": "Havana"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": FOUND}
    asked += [{"role": "assistant", "content": [call.model_dump()]}, {"role": "user", "content": [result]}]
    assert messages_of.create(messages=asked, tools=[tool], **ask).content[0].text == SUNNY
    assert messages_of.count_tokens(model="demo", messages=asked[:1]).input_tokens > 0


# ---- libraries on top ------------------------------------------------------------------------------------------


def test_litellm(url, as_usual):
    litellm = pytest.importorskip("litellm")
    ask = {"model": "hosted_vllm/demo", "api_base": url, "temperature": 0}
    said = litellm.completion(messages=[{"role": "user", "content": CAPITAL}], **ask)
    assert said.choices[0].message.content == PARIS
    said = litellm.completion(messages=[{"role": "user", "content": WEATHER}], tools=TOOLS, **ask)
    (call,) = said.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Havana"}
    said = litellm.completion(messages=[{"role": "user", "content": SUM}], extra_body=THINKING, **ask)
    assert said.choices[0].message.reasoning_content and "55" in said.choices[0].message.content
    pieces = litellm.completion(messages=[{"role": "user", "content": CAPITAL}], stream=True, **ask)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == PARIS


@pytest.fixture
def langchain(url):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    return chat(model="demo", base_url=url, api_key="none", temperature=0, max_tokens=256)


def test_langchain(langchain):
    assert langchain.invoke(CAPITAL).content == PARIS
    assert "".join(piece.text for piece in langchain.stream(CAPITAL)) == PARIS
    (call,) = langchain.bind_tools(TOOLS).invoke(WEATHER).tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Havana"})


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured(langchain, method):
    assert isinstance(langchain.with_structured_output(City, method=method).invoke("Name a city."), City)


@pytest.mark.parametrize("kind", ["OpenAIChatCompletionsModel", "OpenAIResponsesModel"])
def test_openai_agents(url, as_usual, kind):
    agents = pytest.importorskip("agents")
    openai = pytest.importorskip("openai")

    @agents.function_tool(strict_mode=False)
    def get_weather(city: str) -> str:
        """Weather in a city."""
        return FOUND if city == "Havana" else "unknown"

    agents.set_tracing_disabled(True)
    model = getattr(agents, kind)("demo", openai.AsyncOpenAI(base_url=url, api_key="none"))
    agent = agents.Agent("weather", model=model, tools=[get_weather])
    agent.model_settings = agents.ModelSettings(temperature=0)
    assert agents.Runner.run_sync(agent, WEATHER).final_output == SUNNY


@pytest.fixture
def pydantic_ai_model(url):
    pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return OpenAIChatModel("demo", provider=OpenAIProvider(base_url=url, api_key="none"))


def test_pydantic_ai(pydantic_ai_model):
    from pydantic_ai import Agent

    agent = Agent(pydantic_ai_model, model_settings={"temperature": 0})

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Weather in a city."""
        return FOUND if city == "Havana" else "unknown"

    assert agent.run_sync(WEATHER).output == SUNNY


def test_pydantic_ai_output_type(pydantic_ai_model):
    from pydantic_ai import Agent

    agent = Agent(pydantic_ai_model, output_type=City, model_settings={"temperature": 0, "max_tokens": 256})
    assert isinstance(agent.run_sync("Name a city.").output, City)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(client, mode):
    instructor = pytest.importorskip("instructor")
    asked = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
    messages = [{"role": "user", "content": "Name a city."}]
    said = asked.chat.completions.create(
        model="demo", messages=messages, response_model=City, max_retries=0, max_tokens=256, temperature=0
    )
    assert isinstance(said, City)
