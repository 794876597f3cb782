"""Chat templates of merged models: Jinja text that the tokenizer renders. Chosen here, never rendered."""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from evomerge.core import RecipeError
from evomerge.plan import ModelHeader, chat_template_of

AUTO = "auto"

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "chatml": (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        "llama3": (
            "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
            "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        ),
        "mistral": (
            "{{ bos_token }}{% set start = namespace(text='') %}{% for message in messages %}"
            "{% if message['role'] == 'system' %}{% set start.text = message['content'] + '\n\n' %}"
            "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
            "{% else %} [INST] {{ start.text }}{{ message['content'] }} [/INST]{% set start.text = '' %}{% endif %}{% endfor %}"
        ),
        "exaone": (
            "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}[|system|][|endofturn|]\n{% endif %}"
            "[|{{ message['role'] }}|]{{ message['content'] }}{% if message['role'] != 'user' %}[|endofturn|]{% endif %}{{ '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}[|assistant|]{% endif %}"
        ),
        "alpaca": (
            "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
            "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
            "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}### Response:\n{% endif %}"
        ),
    }
)
"""The templates of well-known model families, by mergekit's names.

mergekit's texts for llama3 and alpaca have line breaks that differ from the models' training format; these do not.
"""


def chosen_template(wanted: str, headers: Mapping[str, ModelHeader]) -> str | None:
    """The template text for a recipe's `chat_template`; None if "auto" finds none.

    Raises:
        RecipeError: `wanted` is neither a known name nor a template that Jinja can parse.
    """
    if wanted == AUTO:
        found = [text.strip() for text in map(chat_template_of, headers.values()) if text]
        return Counter(found).most_common(1)[0][0] if found else None
    if wanted in BUILT_IN:
        return BUILT_IN[wanted]
    if "{" not in wanted:
        raise RecipeError(f"chat_template {wanted!r} is neither Jinja text nor one of: {AUTO}, {', '.join(BUILT_IN)}")
    _parse(wanted)
    return wanted


def _parse(text: str) -> None:
    """Raise RecipeError if Jinja, with the extensions that transformers uses, cannot parse `text`."""
    from jinja2.exceptions import TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks a model's answer and renders as its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        ImmutableSandboxedEnvironment(extensions=[loopcontrols, Generation]).parse(text)
    except TemplateSyntaxError as problem:
        raise RecipeError(f"chat_template, line {problem.lineno}: {problem.message}") from None
    except RecursionError:
        raise RecipeError("chat_template: nested too deeply") from None
