"""Generated conversations and the tokenizer of the demo checkpoint.

Each kind of conversation is small enough for a model of two million parameters to master. Training and held-out
prompts come from the same generators: whether a prompt is held out is decided by a checksum of what makes it new (a
question about a subject in a certain phrasing, a pair of numbers), so the two sets never meet.
"""

from __future__ import annotations

import contextlib
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]

CONTROL_TOKENS = ["<|startoftext|>", "<|endoftext|>", "<|role_end|>", "[CLS]", "[gMASK]"]
# Not "special": engines strip special tokens from the text they return, and parsers have to see these.
VISIBLE_TOKENS = [
    "<role>",
    "</role>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
END = "<|role_end|>"


@dataclass
class Chat:
    """A conversation whose last answer, up to `<|role_end|>`, is what the model should say."""

    kind: str
    messages: list[Message]
    answer: str
    tools: list[Any] = field(default_factory=list)  # JSON schemas, as in a request
    thinking: bool = False

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"kind": self.kind, "messages": self.messages}
        if self.tools:
            row["tools"] = self.tools
        if self.thinking:
            row["thinking"] = True
        return row | {"answer": self.answer}


class Unsuitable(Exception):
    """The drawn prompt belongs to the other split; draw again."""


@dataclass
class Draw:
    """A source of random choices that accepts prompts of one split only."""

    rng: random.Random
    heldout: bool

    def keep(self, *key: object, share: int = 8) -> None:
        """Raise `Unsuitable` unless `key` belongs to this split. One key in `share` is held out."""
        if (zlib.crc32("/".join(map(str, key)).encode()) % share == 0) != self.heldout:
            raise Unsuitable

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability


# --- small talk about the project ---------------------------------------------------------------------------------

GREETINGS = ["Hi", "Hello", "Hey", "Hello there", "Hi there", "Good morning", "Good evening", "Greetings", "Hey there"]
WELCOME = "Hello! I am the demo model of vllm-bailing. Ask me about the project, a small sum or a capital."

SUBJECTS = {  # subject -> what it is
    "vllm-bailing": "vllm-bailing is a plugin with which vLLM serves BailingMoeV2 models such as Ling-flash-2.0.",
    "this project": "This project is vllm-bailing, a plugin with which vLLM serves BailingMoeV2 models.",
    "vLLM": "vLLM is a fast engine that serves language models behind an OpenAI API.",
    "BailingMoeV2": "BailingMoeV2 is the mixture-of-experts architecture of Ling 2.0 and Ring 2.0.",
    "Ling-mini-2.0": "Ling-mini-2.0 is a BailingMoeV2 model with 16 billion parameters, 1.4 billion of them active.",
    "Ling-flash-2.0": "Ling-flash-2.0 is a BailingMoeV2 model with 103 billion parameters, 6.1 billion of them active.",
    "Ling-1T": "Ling-1T is the largest BailingMoeV2 model: one trillion parameters, 50 billion of them active.",
    "Ring": "Ring is the reasoning branch of the family. It thinks before it answers.",
    "the demo model": "The demo model is a tiny BailingMoeV2 model, trained on a CPU in less than an hour.",
    "YaRN": "YaRN stretches the rotary embedding, so that a model trained on 32768 tokens can read 131072.",
    "MTP": "MTP is multi-token prediction: an extra layer drafts the token after the next one.",
    "a mixture of experts": (
        "A mixture of experts has many small networks per layer and uses only a few for each token."
    ),
    "the router": "The router scores all experts with a sigmoid and sends each token to the best few.",
    "the expert bias": "The expert bias is added to the scores to pick experts. It keeps their load even.",
    "the shared expert": "The shared expert is the one that every token passes through.",
    "grouped routing": "Grouped routing first picks the best groups of experts, then the best experts in them.",
    "QK norm": "QK norm normalises queries and keys in each head before the rotary embedding.",
    "partial rotary": "Partial rotary turns only the first half of each head; the rest has no position.",
    "the KV cache": "The KV cache keeps the keys and values of earlier tokens, so they are computed once.",
    "tensor parallelism": "Tensor parallelism splits every layer over several GPUs.",
    "speculative decoding": "In speculative decoding a cheap draft is checked by the model, many tokens at once.",
    "a tool call": "A tool call is a piece of JSON in which the model names a function and its arguments.",
    "the chat template": "The chat template turns a list of messages into the text that the model reads.",
    "thinking mode": "In thinking mode the model writes its steps between think tags before the answer.",
    "bfloat16": "bfloat16 is a 16 bit number format with the range of float32.",
    "safetensors": "safetensors is a file format for weights that loads fast and runs no code.",
    "a token": "A token is a short piece of text, the unit that a model reads and writes.",
    "the plain reference": "The plain reference is the whole architecture in simple PyTorch. It checks the fast model.",
}
ASK_SUBJECT = [
    "What is {}?",
    "What's {}?",
    "Explain {}.",
    "Can you explain {}?",
    "Tell me about {}.",
    "Can you tell me what {} is?",
    "Describe {}.",
    "Please explain {}.",
    "I would like to know what {} is.",
    "Do you know what {} is?",
    "Say something about {}.",
    "What does {} mean?",
]

TASKS = {  # task -> how to do it
    "install vllm-bailing": "Run pip install vllm-bailing beside vLLM. The plugin is found by itself.",
    "install it": "Run pip install vllm-bailing beside vLLM. The plugin is found by itself.",
    "serve a model": "Run vllm serve with the name of the model, such as inclusionAI/Ling-flash-2.0.",
    "run the demo": "Run scripts/demo.sh in the project folder. It needs no GPU.",
    "run the tests": "Run scripts/test.sh in the project folder.",
    "train the demo model": "Run python scripts/train_demo.py. Two cores need less than an hour.",
    "use YaRN": "Add the rope_scaling of the model card to config.json, or give it by --hf-overrides.",
    "turn on thinking": "Send chat_template_kwargs with enable_thinking set to true.",
    "use it from Python": "Create vllm.LLM with the name of the model and call generate or chat.",
    "call the server": "Send your messages to /v1/chat/completions with any OpenAI client.",
    "use several GPUs": "Add --tensor-parallel-size and the number of GPUs to vllm serve.",
    "save GPU memory": "Choose a smaller --max-model-len or a quantised model.",
    "report a bug": "Open an issue with the command, its output and your versions.",
    "stop the server": "Press Ctrl-C in its terminal.",
}
ASK_TASK = [
    "How do I {}?",
    "How can I {}?",
    "How to {}?",
    "Tell me how to {}.",
    "Can you tell me how to {}?",
    "Show me how to {}.",
    "I want to {}. How?",
    "What do I do to {}?",
    "Please help me to {}.",
    "How does one {}?",
]

REMARKS = [  # (answer, phrasings)
    (
        "I am a tiny BailingMoeV2 model that ships with vllm-bailing, so that you can try it without a GPU.",
        ["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself."],
    ),
    (
        "I talk about this project, add small numbers, know capitals, call tools and can think in steps.",
        ["What can you do?", "What can I ask you?", "How can you help me?", "Help", "What do you know?"],
    ),
    (
        "I have about two million parameters, four megabytes in bfloat16.",
        ["How big are you?", "How many parameters do you have?", "What is your size?", "How large are you?"],
    ),
    (
        "No. The demo runs on a CPU. Large models need GPUs.",
        ["Do I need a GPU?", "Is a GPU needed?", "Does this need a GPU?", "Can I run this without a GPU?"],
    ),
    (
        "No. The plugin brings its own config and model classes.",
        ["Do I need to trust remote code?", "Is remote code needed?", "Does it run remote code?"],
    ),
    (
        "It is free software under the Apache-2.0 licence.",
        ["What is the licence?", "Which licence does it have?", "Is it free?", "Is this open source?"],
    ),
    ("I am fine, thank you. What would you like to know?", ["How are you?", "How is it going?", "How are you doing?"]),
    ("You are welcome!", ["Thanks", "Thank you!", "Thank you very much.", "Thanks a lot!", "Great, thanks!"]),
    ("Goodbye!", ["Bye", "Goodbye", "See you!", "Bye bye!", "See you later."]),
    (
        "Only English, and only a little.",
        ["Which languages do you speak?", "Do you speak Chinese?", "What is your language?"],
    ),
    ("Yes. Give me tools in the request and I answer with a tool call.", ["Can you call tools?", "Do you use tools?"]),
    (
        "On generated text, on two CPU cores.",
        ["How were you trained?", "What were you trained on?", "Who trained you?"],
    ),
]
INTRODUCTIONS = [
    "My name is {}.",
    "I am {}.",
    "I'm {}.",
    "Call me {}.",
    "Hi, I am {}.",
    "Hello, my name is {}.",
    "This is {}.",
]
OPENERS = ["", "", "", "", "Hi, ", "Hello, ", "Please: ", "One question: ", "So, ", "Ok, "]


def restyle(draw: Draw, text: str) -> str:
    """`text` as people type it: sometimes after an opener, in lower case, without the mark at its end."""
    text = draw.rng.choice(OPENERS) + text
    if draw.chance(0.25):
        text = text.lower()
    if draw.chance(0.2) and text[-1] in ".?!":
        text = text[:-1]
    return text


def small_talk(draw: Draw) -> Chat:
    roll = draw.rng.random()
    if roll < 0.08:
        greeting, mark = draw.rng.choice(GREETINGS), draw.rng.choice(["", "!", ".", ", how are you?", " :)"])
        draw.keep("greeting", greeting, mark)
        text = greeting + mark
        return Chat("small talk", [user(text.lower() if draw.chance(0.3) else text)], WELCOME)
    if roll < 0.2:
        phrasing = draw.rng.choice(INTRODUCTIONS)
        name = name_of(draw, "name", phrasing)
        return Chat("small talk", [user(phrasing.format(name))], f"Nice to meet you, {name}!")
    if roll < 0.65:
        subject, phrasing = draw.rng.choice(list(SUBJECTS)), draw.rng.choice(ASK_SUBJECT)
        draw.keep("subject", subject, phrasing)
        question, answer = phrasing.format(subject), SUBJECTS[subject]
    elif roll < 0.85:
        task, phrasing = draw.rng.choice(list(TASKS)), draw.rng.choice(ASK_TASK)
        draw.keep("task", task, phrasing)
        question, answer = phrasing.format(task), TASKS[task]
    else:
        answer, phrasings = draw.rng.choice(REMARKS)
        question = draw.rng.choice(OPENERS) + draw.rng.choice(phrasings)
        draw.keep("remark", question)  # the phrasings have no common pattern: only the opener is new
        return Chat("small talk", [user(question.lower() if draw.chance(0.25) else question)], answer)
    return Chat("small talk", [user(restyle(draw, question))], answer)


# --- repeating ----------------------------------------------------------------------------------------------------

ASK_REPEAT = ["Say {}", "Say: {}", "Repeat {}", "Repeat: {}", "Say this: {}", "Repeat after me: {}", "Echo {}"]


def repeat(draw: Draw) -> Chat:
    """Words in no order, most of them made up. Nothing teaches a small model faster to copy, which tools need."""
    phrasing = draw.rng.choice(ASK_REPEAT)
    count = draw.rng.randint(1, 6)
    words: list[str] = []
    while len(words) < count:  # all of this split
        with contextlib.suppress(Unsuitable):
            words.append(name_of(draw, "product", phrasing))
    text = " ".join(words)
    return Chat("repeating", [user(phrasing.format(text))], text)


# --- facts --------------------------------------------------------------------------------------------------------

CAPITALS = {
    country: capital
    for country, _, capital in (
        pair.partition(":")
        for pair in (
            "France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|Austria:Vienna|Poland:Warsaw|"
            "Greece:Athens|Norway:Oslo|Sweden:Stockholm|Finland:Helsinki|Denmark:Copenhagen|Ireland:Dublin|"
            "Hungary:Budapest|Belgium:Brussels|Iceland:Reykjavik|Russia:Moscow|Ukraine:Kyiv|Turkey:Ankara|"
            "Egypt:Cairo|Kenya:Nairobi|Nigeria:Abuja|Ghana:Accra|Morocco:Rabat|China:Beijing|Japan:Tokyo|"
            "India:New Delhi|Thailand:Bangkok|Vietnam:Hanoi|Indonesia:Jakarta|Nepal:Kathmandu|Iran:Tehran|"
            "Iraq:Baghdad|Canada:Ottawa|Mexico:Mexico City|Cuba:Havana|Brazil:Brasilia|Peru:Lima|Chile:Santiago|"
            "Argentina:Buenos Aires|Colombia:Bogota|Australia:Canberra"
        ).split("|")
    )
}
CONTINENTS = {
    "Europe": list(CAPITALS)[:18],
    "Africa": ["Egypt", "Kenya", "Nigeria", "Ghana", "Morocco"],
    "Asia": ["China", "Japan", "India", "Thailand", "Vietnam", "Indonesia", "Nepal", "Iran", "Iraq"],
    "America": ["Canada", "Mexico", "Cuba", "Brazil", "Peru", "Chile", "Argentina", "Colombia"],
}
OPPOSITES = (
    "hot cold|big small|fast slow|old new|day night|open closed|"
    "full empty|high low|light dark|wet dry|early late|good bad"
)

FACTS: list[tuple[str, list[str], str, dict[str, str]]] = [  # (topic, phrasings, answer, subject -> value)
    (
        "capitals",
        [
            "What is the capital of {}?",
            "What's the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "Tell me the capital of {}.",
            "Do you know the capital of {}?",
            "The capital of {}?",
            "Can you name the capital of {}?",
            "I need the capital of {}.",
        ],
        "The capital of {} is {}.",
        CAPITALS,
    ),
    (
        "capitals",
        [
            "{} is the capital of which country?",
            "Which country has the capital {}?",
            "Of which country is {} the capital?",
            "What country is {} the capital of?",
            "Tell me the country with the capital {}.",
        ],
        "{} is the capital of {}.",
        {capital: country for country, capital in CAPITALS.items()},
    ),
    (
        "continents",
        [
            "Where is {}?",
            "On which continent is {}?",
            "Which continent is {} in?",
            "What continent does {} lie in?",
            "Name the continent of {}.",
            "In which part of the world is {}?",
        ],
        "{} is in {}.",
        {country: continent for continent, countries in CONTINENTS.items() for country in countries},
    ),
    (
        "words",
        [
            "What is the opposite of {}?",
            "What's the opposite of {}?",
            "Name the opposite of {}.",
            "Tell me the opposite of {}.",
            "Give me the opposite of {}.",
            "Do you know the opposite of {}?",
        ],
        "The opposite of {} is {}.",
        {a: b for pair in OPPOSITES.split("|") for a, b in permutations(pair.split())},
    ),
]


def fact(draw: Draw) -> Chat:
    _, phrasings, answer, table = draw.rng.choices(FACTS, weights=[5, 2, 2, 1])[0]
    subject, phrasing = draw.rng.choice(list(table)), draw.rng.choice(phrasings)
    draw.keep("fact", subject, phrasing)
    return Chat("facts", [user(restyle(draw, phrasing.format(subject)))], answer.format(subject, table[subject]))


# --- sums ---------------------------------------------------------------------------------------------------------

ASK_SUM = [
    "What is {} + {}?",
    "What is {}+{}?",
    "{} + {}",
    "{}+{}",
    "{} + {} =",
    "{}+{}=?",
    "What is {} plus {}?",
    "How much is {} + {}?",
    "How much is {} plus {}?",
    "Add {} and {}.",
    "Calculate {} + {}.",
    "What's {} + {}?",
    "What is the sum of {} and {}?",
    "Can you add {} and {}?",
]
ASK_DIFFERENCE = [
    "What is {} - {}?",
    "What is {}-{}?",
    "{} - {}",
    "{}-{}",
    "What is {} minus {}?",
    "How much is {} minus {}?",
    "Calculate {} - {}.",
    "What's {} - {}?",
]
TOO_LARGE = "That is a larger sum. Turn on thinking and ask me again."


def small_sum(draw: Draw) -> Chat:
    """One-digit sums and differences; what is new in a held-out prompt is the numbers in their phrasing."""
    if draw.chance(0.1):
        a, b = draw.rng.randint(10, 99), draw.rng.randint(1, 99)
        draw.keep("sum", a, b)
        return Chat("sums", [user(restyle(draw, draw.rng.choice(ASK_SUM).format(a, b)))], TOO_LARGE)
    a, b = draw.rng.randint(0, 9), draw.rng.randint(0, 9)
    if draw.chance(0.35):
        a, b = max(a, b), min(a, b)
        phrasing, answer = draw.rng.choice(ASK_DIFFERENCE), f"{a} - {b} = {a - b}"
        draw.keep("difference", a, b, phrasing)
    else:
        phrasing, answer = draw.rng.choice(ASK_SUM), f"{a} + {b} = {a + b}"
        draw.keep("sum", a, b, phrasing)
    return Chat("sums", [user(restyle(draw, phrasing.format(a, b)))], answer)


def thinking(draw: Draw) -> Chat:
    """A number of two digits plus one of one digit, worked out digit by digit in thinking mode."""
    a, b = draw.rng.randint(10, 99), draw.rng.randint(1, 9)
    draw.keep("sum", a, b)
    ones, carry = a % 10 + b, (a % 10 + b) // 10
    steps = f"{a} + {b}\nOnes: {a % 10} + {b} = {ones}, carry {carry}.\nTens: {a // 10} + {carry} = {a // 10 + carry}."
    question = restyle(draw, draw.rng.choice(ASK_SUM).format(a, b))
    answer = f"<think>\n{steps}\n</think>\n\n{a} + {b} = {a + b}"
    return Chat("thinking", [user(question)], answer, thinking=True)


# --- tools --------------------------------------------------------------------------------------------------------

Result = tuple[dict[str, Any], str]


@dataclass
class Topic:
    """Something a tool can look up: its argument, how people ask, and what a result looks like in JSON and words."""

    argument: str
    description: str
    questions: list[str]
    result: Callable[[random.Random, str], Result]


def _weather(rng: random.Random, name: str) -> Result:
    degrees, sky = rng.randint(20, 29), rng.choice(["sunny", "cloudy", "rainy", "windy", "foggy"])
    return {"temperature": degrees, "sky": sky}, f"It is {degrees} degrees and {sky} in {name}."


def _time(rng: random.Random, name: str) -> Result:
    clock = f"{rng.randint(1, 9)}:00"
    return {"time": clock}, f"It is {clock} in {name}."


def _phone(rng: random.Random, name: str) -> Result:
    number = f"555-010{rng.randint(0, 9)}"
    return {"phone": number}, f"The phone number of {name} is {number}."


def _age(rng: random.Random, name: str) -> Result:
    age = rng.randint(20, 29)
    return {"age": age}, f"{name} is {age} years old."


def _price(rng: random.Random, name: str) -> Result:
    price = 10 * rng.randint(1, 9)
    return {"price": price}, f"The {name} costs {price} euros."


TOPICS = {
    "weather": Topic(
        "city",
        "Weather in a city",
        [
            "What is the weather in {}?",
            "How is the weather in {}?",
            "What's the weather like in {}?",
            "Tell me the weather in {}.",
            "Weather in {}?",
            "What is the weather in {} today?",
        ],
        _weather,
    ),
    "time": Topic(
        "city",
        "Time in a city",
        ["What time is it in {}?", "What is the time in {}?", "Tell me the time in {}.", "How late is it in {}?"],
        _time,
    ),
    "phone": Topic(
        "name",
        "Phone number of a person",
        [
            "What is the phone number of {}?",
            "Find the phone number of {}.",
            "How can I call {}?",
            "I need the phone number of {}.",
        ],
        _phone,
    ),
    "age": Topic(
        "name", "Age of a person", ["How old is {}?", "What is the age of {}?", "Tell me the age of {}."], _age
    ),
    "price": Topic(
        "product",
        "Price of a product",
        ["How much does the {} cost?", "What is the price of the {}?", "Tell me the price of the {}."],
        _price,
    ),
}
VERBS = ["get", "look_up"]
NO_TOOL = "I cannot look that up without a tool."

PEOPLE = (
    "Anna|Ben|Clara|David|Emma|Felix|Grace|Henry|Iris|Jonas|Karen|Leo|Maria|Nina|Oscar|Paul|"
    "Quinn|Rosa|Simon|Tina|Ursula|Victor|Wanda|Xavier|Yusuf|Zoe"
).split("|")
PRODUCTS = "lamp|chair|table|phone|guitar|bicycle|camera|kettle|umbrella|violin|jacket|notebook".split("|")
NAMES = {"city": list(CAPITALS.values()), "name": PEOPLE, "product": PRODUCTS}
SYLLABLES = [consonant + vowel for consonant in "klmnrstv" for vowel in "aeiou"]


def name_of(draw: Draw, argument: str, phrasing: str = "") -> str:
    """A known name, or more often one made up, which the model can only copy.

    New in a held-out prompt is a made-up name as such, a known one in its phrasing.
    """
    if draw.chance(0.3):
        name = draw.rng.choice(NAMES[argument])
        draw.keep("known name", name, phrasing)
        return name
    # Capital letters are tokens of their own, so that the name is cut into the same pieces wherever it stands.
    name = "".join(draw.rng.choices(SYLLABLES, k=3)).capitalize()
    draw.keep("made-up name", name)
    return name


def tool(draw: Draw, subject: str, verb: str) -> dict[str, Any]:
    topic = TOPICS[subject]
    description = topic.description + draw.rng.choice(["", "", "."])
    schema: dict[str, Any] = {"type": "string"}
    if draw.chance(0.15):
        schema["description"] = f"The {topic.argument}"
    return {
        "type": "function",
        "function": {
            "name": f"{verb}_{subject}",
            "description": description,
            "parameters": {"type": "object", "properties": {topic.argument: schema}, "required": [topic.argument]},
        },
    }


def tool_use(draw: Draw) -> tuple[list[dict[str, Any]], list[Message], str, str, str]:
    """Tools, a question for one of them, the call as text, and the answer once there is a result, with that result."""
    subjects = draw.rng.sample(list(TOPICS), draw.rng.choice([1, 1, 1, 2]))
    verb = draw.rng.choice(VERBS)
    tools = [tool(draw, subject, verb) for subject in subjects]
    topic = TOPICS[subjects[0]]
    phrasing = draw.rng.choice(topic.questions)
    name = name_of(draw, topic.argument, phrasing)
    question = phrasing.format(name)
    if draw.chance(0.2) and question[-1] in ".?":
        question = question[:-1]
    call = {"name": f"{verb}_{subjects[0]}", "arguments": {topic.argument: name}}
    messages: list[Message] = [user(draw.rng.choice(OPENERS) + question)]
    result, sentence = topic.result(draw.rng, name)
    draw.rng.shuffle(tools)
    return tools, messages, json.dumps(call), json.dumps(result), sentence


def tool_call(draw: Draw) -> Chat:
    tools, messages, call, _, _ = tool_use(draw)
    if draw.chance(0.04):
        return Chat("tool calls", messages, NO_TOOL)
    return Chat("tool calls", messages, f"<tool_call>\n{call}\n</tool_call>", tools)


def tool_result(draw: Draw) -> Chat:
    tools, messages, call, result, sentence = tool_use(draw)
    function = {"type": "function", "function": json.loads(call)}
    messages += [{"role": "assistant", "content": "", "tool_calls": [function]}, {"role": "tool", "content": result}]
    return Chat("tool results", messages, sentence, tools)


# --- whole conversations ------------------------------------------------------------------------------------------

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are Ling, a helpful assistant.",
    "You are a friendly assistant. Answer briefly.",
    "Be helpful and brief.",
    "You are the demo of vllm-bailing.",
]
KINDS: dict[str, Callable[[Draw], Chat]] = {
    "small talk": small_talk,
    "repeating": repeat,
    "facts": fact,
    "sums": small_sum,
    "thinking": thinking,
    "tool calls": tool_call,
    "tool results": tool_result,
}
TRAINING_SHARES = {
    "small talk": 20,
    "repeating": 6,
    "facts": 18,
    "sums": 16,
    "thinking": 16,
    "tool calls": 12,
    "tool results": 12,
}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def draw_until_kept(draw: Draw, kind: str) -> Chat:
    while True:
        try:
            return KINDS[kind](draw)
        except Unsuitable:
            continue


def conversation(draw: Draw, kind: str, turns: int) -> Chat:
    """A chat of `kind` behind `turns` earlier questions with their answers, with or without a system prompt."""
    chat = draw_until_kept(draw, kind)
    history: list[Message] = []
    for _ in range(turns):
        earlier = draw_until_kept(draw, draw.rng.choice(["small talk", "facts", "sums"]))
        history += [*earlier.messages, {"role": "assistant", "content": earlier.answer}]
    if draw.chance(0.2):
        history.insert(0, {"role": "system", "content": draw.rng.choice(SYSTEM_PROMPTS)})
    chat.messages = history + chat.messages
    if not chat.tools and not chat.thinking and chat.answer != NO_TOOL and draw.chance(0.06):
        chat.tools = [tool(draw, draw.rng.choice(list(TOPICS)), draw.rng.choice(VERBS))]  # present, but not needed
    return chat


def training_chats(seed: int, part: int = 0, only: str | None = None) -> Iterator[Chat]:
    """Endless training conversations, of kind `only` or of all kinds; every `part` is a stream of its own."""
    draw = Draw(random.Random(f"{seed}/training/{part}"), heldout=False)
    while True:
        kind = only or draw.rng.choices(list(TRAINING_SHARES), weights=list(TRAINING_SHARES.values()))[0]
        turns = draw.rng.choices([0, 1, 2, 4, 8, 16], weights=[70, 15, 8, 5, 1.5, 0.5])[0]
        yield conversation(draw, kind, turns)


def heldout_chats(seed: int, per_kind: int = 60) -> list[Chat]:
    """Different conversations, `per_kind` of each kind, none of which training can produce."""
    draw = Draw(random.Random(f"{seed}/heldout"), heldout=True)
    chats: list[Chat] = []
    seen: set[str] = set()
    for kind in KINDS:
        while len(chats) < per_kind * (list(KINDS).index(kind) + 1):
            chat = conversation(draw, kind, draw.rng.choices([0, 1, 2], weights=[8, 1, 1])[0])
            if (key := json.dumps(chat.messages)) not in seen:
                seen.add(key)
                chats.append(chat)
    return chats


# --- text and tokens ----------------------------------------------------------------------------------------------


def render(tokenizer: PreTrainedTokenizerFast, chat: Chat, answered: bool = True) -> str:
    """The text of `chat` up to the answer, and with it where `answered`."""
    text = tokenizer.apply_chat_template(
        chat.messages,
        tools=chat.tools or None,
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=chat.thinking,
    )
    return f"{text}{chat.answer}{END}" if answered else str(text)


def build_tokenizer(chat_template: str, seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Ling's special tokens, its merges learned from training conversations.

    Digits and capital letters never merge with their neighbours, so that numbers are read digit by digit and a name is
    cut into the same pieces behind a space and inside quotes.
    """
    backend = Tokenizer(models.BPE())
    words = r"[0-9]|[A-Z]{2,}|[A-Z]| ?[a-z]+| ?[^A-Za-z0-9\s]+|\s"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    added += [AddedToken(token, special=False, normalized=False) for token in VISIBLE_TOKENS]

    def wrap() -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<|startoftext|>",
            eos_token=END,
            pad_token="<|endoftext|>",
            cls_token="[CLS]",
            chat_template=chat_template,
            clean_up_tokenization_spaces=False,
        )

    renderer, chats = wrap(), training_chats(seed)
    texts = [render(renderer, next(chats)) for _ in range(6000)]
    for token in CONTROL_TOKENS + VISIBLE_TOKENS:
        texts = [text.replace(token, "\n") for text in texts]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = renderer.backend_tokenizer.pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens(added)
    return wrap()
