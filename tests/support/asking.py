"""Questions to a server, and its answers taken apart."""

from __future__ import annotations

from tests.support.conversations import HELD_OUT, as_openai, conversation


def say(server, messages, options, stream=False, regex=None, **fields):
    """(reasoning, content, calls, finish reason) of an answer by the OpenAI client."""
    template = {key: value for key, value in options.items() if key != "tools"}
    extra = {"chat_template_kwargs": template}
    if regex:
        extra["structured_outputs"] = {"regex": regex}
    if tools := options.get("tools"):
        fields["tools"] = tools
    fields = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 160, **fields}
    answer = server.client.chat.completions.create(**fields, stream=stream, extra_body=extra)
    if not stream:
        choice = answer.choices[0]
        message = choice.message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        return getattr(message, "reasoning", None) or "", message.content or "", calls, choice.finish_reason
    reasoning, content, calls, reason = "", "", [], None
    for chunk in answer:
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                if call.index == len(calls):
                    calls.append((call.function.name, ""))
                calls[-1] = (calls[-1][0], calls[-1][1] + (call.function.arguments or ""))
    return reasoning, content, calls, reason


def first(kind):
    row = next(row for row in HELD_OUT if row["kind"] == kind)
    messages, options = conversation(row)
    return as_openai(messages), options, row["answer"]
