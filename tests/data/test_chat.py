"""Which part of a chat is supervised, under many templates; compared as the text of the supervised tokens."""

import re

import pytest

from lora_ft.core.errors import ConfigError, DataError, ModelError
from lora_ft.data.encode import load_examples
from lora_ft.data.template import Template
from lora_ft.evaluation.references import group_by_prompt

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_BARE = CHATML.partition("{% if add")[0]  # ignores add_generation_prompt
CHATML_DEFAULT_SYSTEM = (  # as SmolLM2 and Qwen2.5
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SYSTEM_LAST = (  # as Mistral: the system prompt is in the last user turn
    "{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ s + '\n\n' if loop.last or loop.index0 == messages | length - 2 else '' }}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
FORGETS_THINKING = (  # as Qwen3: thinking only after the last question, and an empty block if there is none
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.index0 > ns.last %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '' %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKS_FIRST = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")  # as DeepSeek-R1
REWRITES = CHATML.replace("m.content +", "m.content | reverse +").partition("{% if add")[0]
REWRITES_AND_SAYS_WHERE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | upper }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') if strftime_now is defined }} " + CHATML

U1, A1 = {"role": "user", "content": "hello\nthere"}, {"role": "assistant", "content": "fine!\n\n🤗 you?\n"}
U2, A2 = {"role": "user", "content": "so"}, {"role": "assistant", "content": "it  goes"}
SYSTEM = {"role": "system", "content": "Be brief."}
USER_OR_ASSISTANT = [{"role": "user"}, {"role": "assistant"}]
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
E = "<|im_end|>"


def load(write, tokenizer, *chats, chat_template=None, max_length=200, **settings):
    path = write("chats.jsonl", [{"messages": chat} for chat in chats])
    template = Template(messages="messages", chat_template=chat_template)
    return load_examples([path], template, tokenizer, max_length=max_length, **settings)


def supervised_texts(tokenizer, example) -> list[str]:
    """The texts of the runs of supervised tokens."""
    runs, before = [], False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, -100)
        if label != -100:
            runs = [*runs[:-1], runs[-1] + [token]] if before else [*runs, [token]]
        before = label != -100
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    "template, chat, expected",
    [
        (CHATML, [U1, A1, U2, A2], [A1["content"] + E, A2["content"] + E]),
        (CHATML, [SYSTEM, U1, A1, U2], [A1["content"] + E]),
        (CHATML, [A1, U1, A2], [A1["content"] + E, A2["content"] + E]),  # starts with the assistant
        (CHATML, [U1, A2, A1], [A2["content"] + E, A1["content"] + E]),
        (CHATML, [{"role": "user", "content": "fine"}, {"role": "assistant", "content": "fine"}], ["fine" + E]),
        (CHATML_BARE, [SYSTEM, U1, A1, U2, A2], [A1["content"] + E, A2["content"] + E]),
        (CHATML_DEFAULT_SYSTEM, [U1, A1, U2, A2], [A1["content"] + E, A2["content"] + E]),
        (CHATML_DEFAULT_SYSTEM, [A2, U2, A2], [A2["content"] + E] * 2),
        (LLAMA3, [SYSTEM, U1, A1, U2, A2], ["fine!\n\n🤗 you?<|eot_id|>", "it  goes<|eot_id|>"]),
        (LLAMA2, [U1, A2, U2, A2], [" it  goes </s>"] * 2),
        (SYSTEM_LAST, [SYSTEM, U1, A2, U2, A2], [" it  goes</s>"] * 2),
        (FORGETS_THINKING, [U1, THOUGHT], ["<think>\nhm\n</think>\n\nyes" + E]),
        (FORGETS_THINKING, [U1, THOUGHT, U2, THOUGHT], ["yes" + E, "<think>\nhm\n</think>\n\nyes" + E]),
        (FORGETS_THINKING, [U1, A2, U2, A2], ["it  goes" + E, "<think>\n\n</think>\n\nit  goes" + E]),
        (FORGETS_THINKING, [U1, THOUGHT, U2], ["yes" + E]),
        (THINKS_FIRST, [U1, THOUGHT], ["hm\n</think>\n\nyes" + E]),
        (THINKS_FIRST, [U1, A2], ["it  goes" + E]),
        (REWRITES_AND_SAYS_WHERE, [U1, A2, U2, A2], ["IT  GOES" + E] * 2),
        (NO_END, [U1, A2, U2, A2], ["it  goes\n", "it  goes\n</s>"]),
        (NO_END, [U1, A2, U2], ["it  goes\n"]),
    ],
)
def test_assistant_turns_are_supervised(write, plain, template, chat, expected):
    examples = load(write, plain, chat, chat_template=template)
    example = examples.dataset[0]
    assert supervised_texts(plain, example) == expected
    text = plain.apply_chat_template(chat, chat_template=template, tokenize=False)
    if template is NO_END and chat[-1]["role"] == "assistant":
        text += "</s>"
    # its generation prompt ends with a space, so that "it" is not the token " it" which the complete text would have
    parts = [text] if template is not NO_END else re.split("(?<=assistant: )", text)
    assert example["input_ids"] == [i for part in parts for i in plain(part, add_special_tokens=False)["input_ids"]]


def test_spans_follow_the_generation_prompt(write, with_bos):
    """The oracle: the ids of the prompt at inference come first, the rest is supervised."""
    for template in (CHATML, LLAMA3):
        example = load(write, with_bos, [SYSTEM, U1, A2], chat_template=template).dataset[0]
        prompt = with_bos.apply_chat_template(
            [SYSTEM, U1], chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert example["input_ids"][: len(prompt)] == prompt
        assert set(example["labels"][: len(prompt)]) == {-100}
        assert supervised_texts(with_bos, example) == ["it  goes" + (E if template == CHATML else "<|eot_id|>")]
        assert (example["prompt_length"], example["choices"], example["label"]) == (0, [], -1)


def test_share_gpt_and_the_tokenizers_own_template(write, make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    chat = [{"from": "human", "value": "so"}, {"from": "gpt", "value": "it goes", "weight": None}]
    with pytest.raises(ModelError, match="data.chat_template"):
        load(write, tokenizer, chat)
    tokenizer.chat_template = CHATML
    example = load(write, tokenizer, chat).dataset[0]
    assert supervised_texts(tokenizer, example) == ["it goes" + E]
    assert tokenizer.decode(example["input_ids"]) == f"<|im_start|>user\nso{E}\n<|im_start|>assistant\nit goes{E}\n"


def test_long_chats_lose_their_end_if_truncate_says_so(write, plain):
    settings = {"chat_template": CHATML, "truncate": "end"}
    full = load(write, plain, [U1, A1, U2, A2], chat_template=CHATML).dataset[0]
    for length in (1, 5, 12, len(full["input_ids"]) - 1):
        cut, kept = full["labels"][:length], any(x != -100 for x in full["labels"][:length])
        if kept:
            examples = load(write, plain, [U1, A1, U2, A2], max_length=length, **settings)
            assert examples.dataset[0]["labels"] == cut and examples.report.truncated == 1
        else:
            with pytest.raises(DataError, match="nothing supervised is left"):
                load(write, plain, [U1, A1, U2, A2], max_length=length, **settings)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, SYSTEM_LAST], ids=["chatml", "llama3", "system last"])
def test_long_chats_keep_their_system_turn_and_what_is_supervised(write, with_bos, template):
    """Turns of the user lose their middle, then the earlier turns go; a supervised turn stays whole or goes whole."""
    asked = [f"begin {i} of what I ask " + "and more " * (60 * (i == 1)) + f"end {i} of it" for i in range(4)]
    said = [f"answer number {i} is said" for i in range(4)]
    chat = [
        SYSTEM,
        *(
            {"role": r, "content": c}
            for pair in zip(asked, said, strict=True)
            for r, c in zip(("user", "assistant"), pair, strict=True)
        ),
    ]
    smallest, size = (
        len(load(write, with_bos, turns, chat_template=template, max_length=5000).dataset[0]["input_ids"])
        for turns in ([SYSTEM, *chat[-2:]], chat)
    )
    whole, turns_seen = re.compile("answer number [0-3] is said"), set()
    for length in range(smallest + 10, size, 25):
        example = load(write, with_bos, chat, chat_template=template, max_length=length).dataset[0]
        text, learned = with_bos.decode(example["input_ids"]), supervised_texts(with_bos, example)
        assert len(example["input_ids"]) <= length and example["truncated"] and "[...]" in text
        assert (
            learned and all(whole.match(turn.strip()) for turn in learned) and learned[-1].strip().startswith(said[-1])
        )
        assert "Be brief." in text and asked[-1] in text
        assert (asked[0] in text) == (len(learned) == 4)  # else the first turns are gone
        if len(learned) > 2:
            assert "begin 1 of what I ask" in text and "end 1 of it" in text
        turns_seen.add(len(learned))
        again = with_bos(text, add_special_tokens=False)["input_ids"]
        assert template is not CHATML or example["input_ids"] == again
    assert len(turns_seen) > 1 and 4 in turns_seen


def test_the_prompt_of_a_long_chat_keeps_its_question(write, plain):
    chat = [SYSTEM, {"role": "user", "content": "begin here " + "and more " * 60 + "to the question?"}, A2]
    examples = load(write, plain, chat, chat_template=CHATML)
    (ids,) = group_by_prompt(
        examples, Template(messages="messages", chat_template=CHATML), plain, max_tokens=60, truncate="column"
    ).ids
    text = plain.decode(ids)
    assert len(ids) <= 60 and text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nbegin here")
    assert text.endswith("the question?<|im_end|>\n<|im_start|>assistant\n") and text.count(" [...] ") == 1


@pytest.mark.parametrize(
    "template, chat, message",
    [
        (LLAMA2, [SYSTEM, U1, A1], "Only user and assistant roles are supported!"),
        (CHATML, [U1], "no assistant turn, so nothing is supervised; its roles are user"),
        (
            CHATML,
            [{"role": "Assistant", "content": "x"}],
            r'unknown role "Assistant".*data.roles: {Assistant: assistant}',
        ),
        (CHATML, [], "its messages are an empty list"),
        (CHATML, "user: hello", "its messages are text"),
        (CHATML, ["hello"], "turn 1 is text"),
        (CHATML, [U1, {"role": "assistant"}], r"turn 2 \(assistant\): its content is null"),
        (CHATML, [U1, {"content": "x"}], "turn 2 has no role"),
        (CHATML, [{"role": "user", "content": ["x"]}, A1], "turn 1: a part of its content is text, not"),
        (
            CHATML,
            [{"role": "user", "content": [{"type": "image_url"}]}, A1],
            'part of its content is of type "image_url"',
        ),
        (
            CHATML,
            [U1, {"role": "assistant", "content": None, "tool_calls": [1]}],
            "turn 2: a tool call is an int without the name",
        ),
        (CHATML, [U1, {"role": "assistant", "content": "\ud83d"}], "lone surrogate"),
        ("{{ messages[0].nothing.at_all }}", [U1, A1], "the chat template fails"),
        (REWRITES, [U1, A1, U2, A2], r"turn 2 \(assistant\) cannot be located"),
    ],
)
def test_bad_chats(write, plain, template, chat, message):
    with pytest.raises(DataError, match=message) as caught:
        load(write, plain, chat, chat_template=template)
    assert "chats.jsonl:1: " in str(caught.value)
    if template != "{{ messages[0].nothing.at_all }}" and template != REWRITES:
        report = load(write, plain, [U1, A2], chat, chat_template=template, bad_rows="skip").report
        assert (report.used, report.skipped_count) == (1, 1) and "chats.jsonl:2: " in report.skipped[0]


def test_chats_of_very_many_turns(write, plain):
    """Each supervised turn takes a rendering of those before it, so not all of them can be; the last one can."""
    turns = [USER_OR_ASSISTANT[i % 2] | {"content": f"turn {i} of a long conversation"} for i in range(6000)]
    path = write("a.jsonl", [{"messages": turns}])
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: 6,000 turns, 3,000 of them supervised: .* set data.supervise: last"
    ):
        load_examples([path], Template(messages="messages", chat_template=CHATML), plain, max_length=200)
    template = Template(messages="messages", chat_template=CHATML, supervise="last")
    examples = load_examples([path], template, plain, max_length=200)
    text = plain.decode(examples.dataset[0]["input_ids"])
    assert "turn 5998 of a long conversation" in text and text.endswith("turn 5999 of a long conversation<|im_end|>\n")


def test_a_template_with_a_syntax_error(write, plain):
    with pytest.raises(ConfigError, match="data.chat_template: line 2"):
        load(write, plain, [U1, A1], chat_template="\n{% for %}")


def test_dates_are_fixed(write, plain):
    text = plain.decode(load(write, plain, [U1, A1], chat_template=DATED).dataset[0]["input_ids"])
    assert text.startswith("26 Jul 2024 ")


def test_content_parts_are_joined(write, plain):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo", "image_url": None}]
    in_parts = load(write, plain, [{"role": "user", "content": parts}, A1], chat_template=CHATML)
    full = load(write, plain, [{"role": "user", "content": "hello"}, A1], chat_template=CHATML)
    assert in_parts.dataset["input_ids"][:] == full.dataset["input_ids"][:]
