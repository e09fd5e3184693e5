"""Names as attributes: `ModelType.qwen_7b_chat` is the text `'qwen-7b-chat'`, looked up in a live mapping."""

from collections.abc import Iterable, Iterator

from octavo.errors import ConfigError, nearest


class Names:
    """The keys of `known` as attributes, with `-` and `.` written as `_`; keys that are added later count too."""

    def __init__(self, title: str, known: Iterable[str]):
        self._title = title
        self._known = known

    def __getattr__(self, name: str) -> str:
        for key in self._known:
            if attribute_of(key) == name:
                return key
        if name.startswith("_"):
            raise AttributeError(name)
        hint = nearest(name, map(attribute_of, self._known))
        raise UnknownNameError(f"{self._title} has no {name!r}.{hint}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __contains__(self, name: object) -> bool:
        return name in set(self._known)

    def __dir__(self) -> list[str]:
        return sorted(map(attribute_of, self._known))

    def get_model_name_list(self) -> list[str]:
        return list(self._known)

    get_template_name_list = get_model_name_list


class UnknownNameError(ConfigError, AttributeError):
    """An attribute that no name has; `hasattr` works as for any object."""


def attribute_of(name: str) -> str:
    return name.replace("-", "_").replace(".", "_")
