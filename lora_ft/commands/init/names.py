"""The names that columns of data sets usually have, in lower case."""

import re

LABELS = ("label", "labels", "class", "sentiment", "intent", "target", "stars", "category", "topic", "rating")
WEAK_LABELS = LABELS[-3:]  # which texts have beside a question and an answer too
LIKE_A_LABEL = re.compile(rf"(^|[_ ])({'|'.join(LABELS)}|class_index|classification)$")
META = re.compile(
    r"(^|[_ ])(u?u?id|idx|index|url|uri|link|date|time|timestamp|source|lang|language|license|path|file|hash)s?$"
)
TEXTS = (
    "text",
    "sentence",
    "review",
    "content",
    "body",
    "comment",
    "document",
    "message",
    "title",
    "subject",
    "headline",
)
SYSTEMS = ("system", "system_prompt", "system_message")
REASONING = re.compile(
    r"^(reason|exp)$|(^|[_ ])(reasoning|rationale|explanations?|cot|chain[_ ]of[_ ]thought|thoughts?|thinking)([_ ]\d)?$"
)
CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat")
ASKS = ("prompt", "question", "instruction", "query", "input")
HELPERS = ("system", "tools", "functions")  # columns that chats read by themselves
KEYS = (
    "answer",
    "answerkey",
    "label",
    "answer_idx",
    "answer_index",
    "correct",
    "correct_option",
    "cop",
    "gold",
    "target",
)
SAID_IN_TURN = (
    ("user", "human", "input", "question", "prompt", "instruction"),
    ("assistant", "gpt", "bot", "output", "answer", "response"),
)
CHOICES = ("choices", "options", "endings", "candidates", "alternatives")
ONE_CHOICE = re.compile(r"^((?:option|op|choice|sol|solution|ending|answer|candidate|response)?[_ ]?)([0-9]|[a-h])$")

ANSWERS: tuple[str, ...] = (
    "output",
    "response",
    "completion",
    "answer",
    "answers",
    "answers_spans",
    "solution",
    "canonical_solution",
    "reply",
)
ANSWERS += ("target", "targets", "summary", "highlights", "correct_answer", "best_answer", "code", "sql")
INSTRUCTION = "### Instruction:\n{%s}{CONTEXT}\n\n### Response:\n"
QUESTION = "{CONTEXT}Question: {%s}\nAnswer:"
SUMMARY = "{%s}\n\nSummary:"
PLAIN = "{CONTEXT}{%s}\n"
# (the column that asks, the columns that answer, of which one; prompt; completion; how a context column is written)
PAIRS = (
    (("instruction",), ANSWERS, INSTRUCTION, "{%s}", "\n\n### %s:\n{%s}"),
    (("question", "question_stem"), (*ANSWERS, "query"), QUESTION, " {%s}", "%s: {%s}\n\n"),
    (("prompt", "query", "problem", "inputs"), ANSWERS, PLAIN, "{%s}", "%s: {%s}\n\n"),
    (("source",), ("target",), "{%s}\n", "{%s}", ""),
    (("input",), ("output", "target"), PLAIN, "{%s}", "%s: {%s}\n\n"),
    (("article", "document", "text", "dialogue"), ("highlights", "summary"), SUMMARY, " {%s}", ""),
    (("text",), ("code",), "{%s}\n", "{%s}", ""),
    (("title",), ("answers", "answer", "reply"), PLAIN, "{%s}", "%s: {%s}\n\n"),
)
CONTEXTS: tuple[str, ...] = (
    "input",
    "context",
    "passage",
    "background",
    "paragraph",
    "document",
    "article",
    "story",
    "facts",
    "schema",
)
CONTEXTS += ("hint", "text", "knowledge", "support", "definition", "selftext", *SYSTEMS)
