"""JSON Schemas of the kinds people ask for, made from a seed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Schema = dict[str, object]
NAMES = ("name", "age", "city", "tags", "items", "status", "total price", "is_active", "e-mail", "größe")
FORMATS = ("date", "time", "date-time", "uuid", "email", "ipv4", "duration")
PATTERNS = ("^[A-Z]{2}-[0-9]{4}$", "^(red|green|blue)$", "^#[0-9a-f]{6}$", "^[a-z]+(_[a-z]+){0,2}$")


def schemas(count: int, seed: int = 0) -> list[Schema]:
    """Objects and arrays, up to three deep, each with what a schema of that kind usually has."""
    return [_Maker(Random(1000 * seed + number)).whole() for number in range(count)]


class _Maker:
    def __init__(self, random: Random) -> None:
        self._random = random
        self._definitions: Schema = {}

    def whole(self) -> Schema:
        schema = self._object(0) if self._random.random() < 0.85 else self._array(0)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _any(self, depth: int) -> Schema:
        flat: list[Callable[[], Schema]] = [self._text, self._integer, self._number, self._choice, self._flag]
        deep = [self._object, self._array, self._either, self._reference, self._merged]
        if depth < 3 and self._random.random() < 0.4:
            return self._random.choice(deep)(depth + 1)
        return self._random.choice(flat)()

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(NAMES, self._random.randint(1, 4))
        required = [name for name in names if self._random.random() < 0.7]
        schema: Schema = {"type": "object", "properties": {name: self._any(depth) for name in names}}
        if required or self._random.random() < 0.5:
            schema["required"] = required
        schema["additionalProperties"] = self._random.choice([False, False, False, {"type": "integer"}])
        return schema

    def _array(self, depth: int) -> Schema:
        low = self._random.randint(0, 2)
        if self._random.random() < 0.2:
            return {"type": "array", "prefixItems": [self._any(depth), self._text()], "minItems": 2, "maxItems": 2}
        return {
            "type": "array",
            "items": self._any(depth),
            "minItems": low,
            "maxItems": low + self._random.randint(0, 3),
        }

    def _either(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth), self._random.choice([{"type": "null"}, self._choice()])]}

    def _merged(self, depth: int) -> Schema:
        first, second = ({"type": "object", "properties": {key: self._any(depth)}, "required": [key]} for key in "ab")
        return {"allOf": [first, second]}

    def _reference(self, depth: int) -> Schema:
        name = f"Part{len(self._definitions)}"
        self._definitions[name] = {}
        if self._random.random() < 0.3:  # a tree
            children = {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 1}
            made: Schema = {"type": "object", "properties": {"value": self._integer(), "children": children}}
            made |= {"required": ["value"], "additionalProperties": False}
        else:
            made = self._any(depth)
        self._definitions[name] = made
        return {"$ref": f"#/$defs/{name}"}

    def _text(self) -> Schema:
        kind = self._random.random()
        if kind < 0.3:
            return {"type": "string", "format": self._random.choice(FORMATS)}
        if kind < 0.5:
            return {"type": "string", "pattern": self._random.choice(PATTERNS), "description": "a code"}
        low = self._random.randint(0, 3)
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randint(0, 8)}

    def _integer(self) -> Schema:
        low = self._random.randint(-50, 50)
        bounds = [{"minimum": low, "maximum": low + 500}, {"exclusiveMinimum": low, "exclusiveMaximum": low + 12}]
        return {"type": "integer", **self._random.choice([*bounds, {"minimum": 0, "maximum": 1000, "multipleOf": 5}])}

    def _number(self) -> Schema:
        return {
            "type": "number",
            "minimum": self._random.choice([-1, 0, 0.5]),
            "maximum": self._random.choice([1, 99.5]),
        }

    def _choice(self) -> Schema:
        values: list[object] = ["open", "closed", "in progress", 3, None, 'ändern "it"']
        return {"enum": self._random.sample(values, self._random.randint(1, 4))}

    def _flag(self) -> Schema:
        return self._random.choice([{"type": "boolean"}, {"type": ["boolean", "null"]}, {"const": "fixed"}])
