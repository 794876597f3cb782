"""Reads untrusted YAML: refuses tags, duplicate keys and alias bombs."""

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.reader import ReaderError

from evomerge.core.errors import ConfigError

MAX_YAML_BYTES = 4 << 20
"""Maximum length, compared with the number of characters, so that text which is not ASCII may have more bytes. Far above any hand-written config; a
recipe with a slice for every layer of a 126-layer model has about 0.2 MB."""

MAX_YAML_ALIASES = 100
"""Enough for hand-written anchors; the nested aliases of a "billion laughs" file need many."""

MAX_YAML_VALUES = 1_000_000
"""maximum number of values with all aliases expanded"""

_KEPT_AS_STRINGS = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
"""plain scalars of these types stay strings, since a name may look like a date"""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

_CONSTRUCTION_ERRORS = (ValueError, KeyError, AttributeError, TypeError, IndexError)
"""what PyYAML's constructors raise for text that does not match its tag, such as `!!bool maybe`"""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but refuses duplicate keys, more than `MAX_YAML_ALIASES` aliases, and recursive aliases.

    All errors are `MarkedYAMLError`, which contain the line.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's name)
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _KEPT_AS_STRINGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._n_aliases = 0
        self._n_merged = 0
        self._open_anchors: set[str] = set()

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            self._n_aliases += 1
            if self._n_aliases > MAX_YAML_ALIASES:
                raise _wrong(f"more than {MAX_YAML_ALIASES} aliases", event)
            if anchor in self._open_anchors:
                raise _wrong(f"alias *{anchor} is inside the value that it refers to", event)
        elif anchor is not None:
            if anchor in self.anchors:
                raise _wrong(f"anchor &{anchor} appears twice", event)
            self._open_anchors.add(anchor)
            node = super().compose_node(parent, index)
            self._open_anchors.remove(anchor)
            return node
        return super().compose_node(parent, index)

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """Like PyYAML, except that 1:30 is a string: in YAML 1.1 it is the number 90."""
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        is_time = kind is yaml.ScalarNode and ":" in value and tag in _NUMBERS
        return "tag:yaml.org,2002:str" if is_time else tag

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Like PyYAML, except that a surrogate pair, as JSON escapes some characters, becomes one character.

        Lone surrogates are refused unless they stand for bytes of a file name that is not UTF-8 (PEP 383).
        """
        value = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in value):
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
            try:
                value.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise _wrong("lone surrogate (half of an escaped character)", node) from None
        return value

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _CONSTRUCTION_ERRORS:
            raise _wrong(f"{node.value!r} is not a valid {node.tag.rpartition(':')[2]}", node) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _wrong("expected a mapping", node)
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.tag == "tag:yaml.org,2002:bool":  # `on` is a setting's name
                key_node.tag = "tag:yaml.org,2002:str"
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _wrong(f"{key!r} cannot be a key", key_node)
            if key in seen:
                raise _wrong(f"key {key!r} appears twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Like PyYAML, but limits the expansion of `<<`, which may be an alias bomb too."""
        super().flatten_mapping(node)
        self._n_merged += len(node.value)
        if self._n_merged > MAX_YAML_VALUES:
            raise _wrong(f"aliases expand to more than {MAX_YAML_VALUES} values", node)

    def construct_unknown(self, node: yaml.Node) -> Any:
        """Refuse a tag."""
        raise _wrong(f"tag {node.tag!r} is not supported; use plain values only", node)


_StrictLoader.add_constructor(None, _StrictLoader.construct_unknown)


def _wrong(problem: str, place: Any) -> yaml.MarkedYAMLError:
    """An error at the place of an event or node."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def load_yaml(text: str, where: str, error: type[Exception] = ConfigError) -> Any:
    """Load the single document in `text` as plain dicts, lists and scalars.

    Args:
        text: YAML 1.1 as read by PyYAML.
        where: the file's name, for messages.
        error: the exception to raise.

    Raises:
        error: the text is not YAML, is too long, or has an unsupported tag, duplicate keys or too many aliases.
    """
    documents = load_yaml_documents(text, where, error)
    if not documents:
        raise error(f"{where}: is empty")
    if len(documents) != 1:
        raise error(f"{where}: expected one YAML document, found {len(documents)}")
    return documents[0]


def load_yaml_documents(text: str, where: str, error: type[Exception] = ConfigError) -> list[Any]:
    """Load all documents in `text`; see `load_yaml` for limits and errors."""
    if len(text) > MAX_YAML_BYTES:
        raise error(f"{where}: has {len(text)} characters; the limit for YAML is {MAX_YAML_BYTES} characters")
    try:
        documents = list(yaml.load_all(text, Loader=_StrictLoader))
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (problem.context, problem.problem) if part)
        raise error(f"{where}{place}: {what or problem}") from None
    except ReaderError as problem:
        line = text.count("\n", 0, problem.position) + 1
        raise error(f"{where}, line {line}: character {chr(problem.character)!r} is not allowed in YAML") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise error(f"{where}: cannot be read as YAML: {problem}") from None
    for document in documents:
        _refuse_expansion(document, where, error)
    return documents


def _refuse_expansion(document: Any, where: str, error: type[Exception]) -> None:
    """Raise `error` if the document with all aliases expanded would be too large or too deep; does not expand it."""
    sizes: dict[int, int] = {}

    def size(value: Any, depth: int) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            if depth > 100:
                raise error(f"{where}: nested more than 100 levels deep")
            children = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(child, depth + 1) for child in children)
        return sizes[id(value)]

    if size(document, 0) >= MAX_YAML_VALUES:
        raise error(f"{where}: its aliases expand to more than {MAX_YAML_VALUES} values")
