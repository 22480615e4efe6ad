"""What is trained is what a rollout would write: fields, ends, openings, stripped reasoning, the day of a template.

The templates are short ones with the behaviours of those in use.
"""

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lora_plugin.errors import ProbeError
from hybrid_lora_plugin.probing.data.rows import row_of
from hybrid_lora_plugin.probing.data.tokens import RowTokenizer
from tests.support.tiny_models import CHAT_TEMPLATE, make_char_tokenizer

USER = {"role": "user", "content": "1+1="}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLING = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "x"},
    {"role": "assistant", "content": "two"},
]
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}" + GENERATION
)
# As Qwen3's: reasoning is shown after the last user turn only, and always has its place there.
STRIPS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set reasoning = m.reasoning_content or '' %}"
    "{% if '</think>' in m.content %}{% set reasoning = m.content.split('</think>')[0].split('<think>')[-1] %}"
    "{% endif %}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ reasoning.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}" + GENERATION
)
# As those of R1's distillations: the generation prompt opens the reasoning, and no rendering shows any.
OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def tokenizer_of(template=CHAT_TEMPLATE, **tokens):
    tokenizer = make_char_tokenizer()
    tokenizer.chat_template = template
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return tokenizer


def trained(row, template=CHAT_TEMPLATE, tokenizer=None, **options):
    """The prompt, the trained texts and what the user is told."""
    tokenizer = tokenizer or tokenizer_of(template)
    tokens_of = RowTokenizer(tokenizer, **options)
    example = tokens_of(row_of(row, "row 1"))
    ids = example.input_ids.tolist()
    texts = [tokenizer.decode(ids[start:end]) for start, end in example.spans]
    return tokenizer.decode(ids[: example.response_start]), texts, "\n".join(tokens_of.findings.lines())


def chat(content, **fields):
    return {"messages": [USER, {"role": "assistant", "content": content, **fields}]}


def test_every_field_of_a_turn_and_the_tools_reach_the_template():
    prompt, texts, told = trained({"messages": CALLING, "tools": [TOOL]}, TOOLS)
    assert '"name": "add", "parameters"' in prompt and '[add {"a": 1, "b": 1}]' in prompt
    assert texts == ["two<|im_end|>"]
    assert "`tool_call_id`" in told and "`content`" not in told
    prompt, texts, _ = trained({"messages": CALLING[:2], "tools": [TOOL]}, TOOLS)
    assert texts == ['[add {"a": 1, "b": 1}]<|im_end|>'] and prompt.endswith("assistant\n")


@pytest.mark.parametrize("calls", [[CALL], [{**CALL, "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}]])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_are_the_same_with_arguments_as_text_and_with_no_null_or_empty_content(calls, content):
    row = {"messages": [USER, {"role": "assistant", "tool_calls": calls, **content}]}
    assert trained(row, TOOLS)[1] == ['[add {"a": 1, "b": 1}]<|im_end|>']
    # A template that prints what it is given never prints the word None.
    assert trained(row, TOOLS.replace("m.content or ''", "m.content"))[1] == ['[add {"a": 1, "b": 1}]<|im_end|>']


def test_a_template_that_wants_arguments_as_text_gets_text_and_one_that_asks_for_null_gets_null():
    text = TOOLS.replace("c.function.arguments | tojson", "'' + c.function.arguments")
    calls = [{**CALL, "function": {"name": "add", "arguments": '{"a":1}'}}]
    assert trained(chat(None, tool_calls=calls), text)[1] == ['[add {"a":1}]<|im_end|>']
    null = TOOLS.replace("{{ m.content or '' }}", "{{ '' if m.content is none else 'text ' ~ m.content }}")
    assert trained(chat(None, tool_calls=[CALL]), null)[1] == ['[add {"a": 1, "b": 1}]<|im_end|>']


@pytest.mark.parametrize(
    "row, field",
    [
        (chat("2", tool_calls=[CALL]), "`tool_calls` of a turn"),
        ({"messages": CALLING}, "`tool_calls` of a turn"),
        (chat("2", reasoning_content="one and one"), "`reasoning_content` of the response"),
        ({**chat("2"), "tools": [TOOL]}, "`tools`"),
    ],
)
def test_a_field_that_the_template_has_no_place_for_is_refused_by_name(row, field):
    with pytest.raises(ProbeError, match=f"^row 1: the chat template .*{field}"):
        trained(row)


@pytest.mark.parametrize(
    "turn, message",
    [
        (
            {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
            r"messages\[1\].content is a list of parts",
        ),
        ({"role": "assistant", "content": None}, r"messages\[1\].content is null, a turn without text"),
        ({"role": "tool", "content": None, "tool_calls": [CALL]}, r"messages\[1\].content is null"),
        ({"role": "assistant", "tool_calls": 3}, "`tool_calls` is 3; give a list of calls"),
        ({"role": "assistant", "content": "a\ud800"}, r"half a surrogate pair, U\+D800"),
        ({"role": 3, "content": "a"}, r"messages\[1\].role is 3"),
    ],
)
def test_a_turn_that_says_nothing_usable_is_refused_by_field_and_value(turn, message):
    with pytest.raises(ProbeError, match=message):
        trained({"messages": [USER, turn]}, TOOLS)


CONVERSATION = [USER, {"role": "assistant", "content": "2"}, USER, {"role": "assistant", "content": "two"}, USER]


def test_the_last_or_all_assistant_turns_are_trained_and_what_is_not_is_told():
    prompt, texts, told = trained({"messages": CONVERSATION})
    assert texts == ["two<|im_end|>"] and prompt.count("2<|im_end|>") == 1
    assert "probe.train_on=all trains them too" in told and "behind the last assistant turn are not used" in told
    prompt, texts, told = trained({"messages": CONVERSATION}, train_on="all")
    assert texts == ["2<|im_end|>", "two<|im_end|>"] and prompt.count("assistant\n") == 1
    assert "probe.train_on" not in told


def test_a_row_is_cut_inside_and_between_its_responses():
    example = RowTokenizer(tokenizer_of(), train_on="all")(row_of({"messages": CONVERSATION}, "row 1"))
    (first, end), (second, last) = example.spans
    assert example.cut_at(last) is example and example.cut_at(first) is None
    cut = example.cut_at(second + 1)
    assert (cut.spans, cut.lost, cut.cut) == (
        ((first, end), (second, second + 1)),
        last - second - 1,
        last - second - 1,
    )
    assert example.cut_at(second).spans == ((first, end),) and example.cut_at(first + 1).spans == ((first, first + 1),)


def test_the_end_of_the_template_is_trained_and_another_end_token_is_told():
    """As in a converted SmolLM2 and in base checkpoints: the tokenizer's end token is not the template's."""
    wrong = tokenizer_of(eos_token="<|im_start|>")
    prompt, texts, told = trained(chat("2"), tokenizer=wrong)
    assert texts == ["2<|im_end|>"]
    assert "ends a turn with '<|im_end|>'" in told and "end token is '<|im_start|>'" in told
    # Gemma's generation config names the end of a turn beside the end token.
    assert trained(chat("2"), tokenizer=wrong, stops=[wrong.convert_tokens_to_ids("<|im_end|>")])[2] == ""
    assert trained(chat("2"))[2] == ""


def test_a_template_that_ends_no_turn_gets_the_end_token_and_it_is_told():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    prompt, texts, told = trained(chat("2"), template)
    assert texts == ["2<|im_end|>"] and "ends the response with '\\n' and no special token" in told


def test_a_generation_prompt_that_opens_reasoning_is_not_opened_twice():
    prompt, texts, told = trained(chat("<think>\none and one</think>2"), OPENS)
    assert prompt.endswith("assistant\n<think>\n") and texts == ["one and one</think>2<|im_end|>"]
    assert "opens the response with '<think>\\n'" in told and "2<|im_end|>" in told
    with pytest.raises(ProbeError, match=r"^row 1: prompt and response do not begin .*<think>.*assistant.n2<"):
        trained(chat("2"), OPENS)
    # One whose rendering shows the reasoning needs no word: the response is what follows.
    shows = STRIPS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    prompt, texts, told = trained(chat("2", reasoning_content="one and one"), shows)
    assert prompt.endswith("<think>\n") and texts == ["one and one\n</think>\n\n2<|im_end|>"] and told == ""


def test_reasoning_is_rendered_as_the_template_does_or_told():
    _, texts, told = trained(chat("2", reasoning_content="one and one"), STRIPS)
    assert texts == ["<think>\none and one\n</think>\n\n2<|im_end|>"] and told == ""
    _, texts, told = trained(chat("2"), STRIPS)
    assert texts == ["<think>\n\n</think>\n\n2<|im_end|>"] and "before the response '2'" in told
    _, texts, told = trained(chat("<think>one and one</think>2"), STRIPS)
    assert texts == ["<think>\none and one\n</think>\n\n2<|im_end|>"] and "white space" in told
    cuts = OPENS.replace("<think>\n{% endif %}", "{% endif %}")
    _, texts, told = trained(chat("<think>one and one</think>2"), cuts)
    assert texts == ["<think>one and one</think>2<|im_end|>"] and "cuts the reasoning out" in told


def test_reasoning_stripped_from_earlier_turns_is_refused_where_all_turns_are_trained():
    turns = [
        USER,
        {"role": "assistant", "content": "<think>\na\n</think>\n\n2"},
        USER,
        {"role": "assistant", "content": "3"},
    ]
    prompt, texts, _ = trained({"messages": turns}, STRIPS)
    assert "<think>" not in prompt and texts == ["<think>\n\n</think>\n\n3<|im_end|>"]
    with pytest.raises(
        ProbeError, match=r"^row 1: assistant turn 2 is rendered otherwise .*<think>.*probe.train_on=last"
    ):
        trained({"messages": turns}, STRIPS, train_on="all")


def test_white_space_that_the_template_adds_or_takes_is_trained_as_rendered():
    llama = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    llama += "{% else %} {{ m.content | trim }} <|im_end|>{% endif %}{% endfor %}"
    prompt, texts, told = trained(chat("2\n"), llama)
    assert prompt == "[INST] 1+1= [/INST]" and texts == [" 2 <|im_end|>"] and "white space" in told


def test_a_template_without_a_generation_prompt_and_one_that_changes_the_response_are_refused():
    with pytest.raises(ProbeError, match="no generation prompt: .*1[+]1=.*assistant"):
        trained(chat("2"), CHAT_TEMPLATE.split("{% if add_generation_prompt")[0])
    with pytest.raises(ProbeError, match="does not render the response 'yes' but 'YES<"):
        trained(chat("yes"), CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper"))


def test_special_tokens_in_a_text_are_told():
    rendered = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert "holds '<|im_start|>', which becomes that special token" in trained({"prompt": rendered, "response": "2"})[2]


def appending(before, behind):
    """A tokenizer without a template that puts tokens before and behind every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(None)
    used = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (before, behind)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{before} $A {behind}", special_tokens=used)
    return tokenizer


def test_a_tokenizer_that_appends_an_end_does_not_end_the_prompt_and_none_begins_twice():
    tokenizer = appending("<|im_start|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("ab")["input_ids"]) == "<|im_start|>ab<|im_end|>"
    prompt, texts, told = trained({"prompt": "ab", "response": "c"}, tokenizer=tokenizer)
    assert prompt == "<|im_start|>ab" and texts == ["c<|im_end|>"] and "appends '<|im_end|>' to a prompt" in told
    prompt, _, told = trained({"prompt": "<|im_start|>ab", "response": "c"}, tokenizer=tokenizer)
    assert prompt == "<|im_start|>ab" and "begins with '<|im_start|>' already" in told
    # A chat is tokenised as the template renders it, whatever the tokenizer would add.
    tokenizer.chat_template = CHAT_TEMPLATE
    prompt, texts, told = trained(chat("2"), tokenizer=tokenizer)
    assert prompt.startswith("<|im_start|>user") and texts == ["2<|im_end|>"] and told == ""


def test_a_token_over_the_boundary_is_parted_as_in_a_rollout():
    tokenizer = tokenizer_of(None)
    tokenizer.add_tokens(["bc"])
    prompt, texts, told = trained({"prompt": "ab", "response": "cd"}, tokenizer=tokenizer)
    assert (prompt, texts) == ("ab", ["cd<|im_end|>"]) and "tokenised apart" in told


def test_ids_beyond_the_embedding_and_unknown_text_are_named():
    tokenizer = tokenizer_of()
    with pytest.raises(ProbeError, match=r"^row 1: its token '\\n' has id \d+, and the model's embedding has 50 rows"):
        trained(chat("2"), tokenizer=tokenizer, vocabulary=50)
    assert "only knows as '<unk>'" in trained(chat("é"), tokenizer=tokenizer)[2]


FIELD = st.none() | st.text(max_size=4) | st.integers(0, 3)
CALLS = st.lists(
    st.dictionaries(st.sampled_from(["function", "name", "arguments", "x"]), FIELD, max_size=3), max_size=2
)
TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "tool"]),
        "content": st.none() | st.text("a<think>/ \n", max_size=12),
    },
    optional={"tool_calls": CALLS | FIELD, "reasoning_content": FIELD, "name": FIELD},
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    st.sampled_from([CHAT_TEMPLATE, TOOLS, STRIPS, OPENS]),
    st.sampled_from(["last", "all"]),
    st.lists(TURN, min_size=2, max_size=5),
    st.dictionaries(st.sampled_from(["tools", "chat_template_kwargs", "documents"]), FIELD | st.just([TOOL])),
)
def test_any_conversation_is_a_beginning_of_its_rendering_or_told_or_refused(template, train_on, turns, columns):
    """Of what is neither told nor refused, the template's own rendering begins with prompt, response and end."""
    tokenizer = tokenizer_of(template)
    tokens_of = RowTokenizer(tokenizer, train_on=train_on)
    try:
        row = row_of({"messages": turns} | columns, "row 1")
        example = tokens_of(row)
    except ProbeError as error:
        assert str(error).startswith("row 1") and "\n" not in str(error)
        return
    told = [line for line in tokens_of.findings.lines() if "earlier" not in line and "does not use" not in line]
    if not told:
        turns = [*row.prompt, {"role": "assistant", "content": row.response} | row.fields]
        whole = tokenizer.apply_chat_template(turns, tokenize=False, **row.options)
        assert whole.startswith(tokenizer.decode(example.input_ids.tolist()))
        assert all(tokenizer.decode(example.input_ids[end - 1 : end]) == "<|im_end|>" for _, end in example.spans)


DATED = "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHAT_TEMPLATE


def test_a_template_that_prints_the_date_prints_the_day_it_is_given():
    prompts = {trained(chat("2"), DATED, day=date(2024, 7, day))[0][19:30] for day in (26, 26, 27)}
    assert prompts == {"26 Jul 2024", "27 Jul 2024"}
    tokens_of = RowTokenizer(tokenizer_of(DATED), day=date(2024, 7, 26))
    assert tokens_of.printed_date is None
    tokens_of(row_of(chat("2"), "row 1"))
    assert tokens_of.printed_date == "2024-07-26"
