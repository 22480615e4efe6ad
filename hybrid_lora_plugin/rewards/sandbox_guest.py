"""What runs inside a sandbox: a program in one, its tests in another. Standard library only, nothing of this package.

``sandbox.py`` hands this file's text to a system's Python (3.8 or newer) as ``-c``, with a role and file descriptors:

    program PAYLOAD            runs the program; reads calls from its input, writes results to its output
    checker PAYLOAD VERDICTS   runs ``check(candidate)``; writes calls to its output, reads results from its input

A payload is a JSON object; calls, results and verdicts are one JSON object a line. The program can make its process say
anything, so the checker believes nothing but values: it rebuilds plain ones (None, numbers, texts, lists, tuples, sets,
dicts, and objects of classes that the problem's prompt defines) and runs no code of theirs. It never sees the program,
and the program never sees the tests.
"""

import importlib.abc
import importlib.util
import json
import os
import resource
import sys
import types

#: Nesting up to which a value goes as JSON itself; deeper ones, as a long linked list, as a table.
_DEEPEST = 40
_MODULE = "program"


class NotPlain(Exception):
    """A value that does not travel."""


# -- values -----------------------------------------------------------------------------------------------------------


def encode(value, classes):
    """A value as JSON: ``{"json": value}`` where JSON has its like, else a table of numbered nodes.

    ``classes`` are the names of classes whose objects travel, as their attributes.
    """
    return {"json": value} if _is_json(value, _DEEPEST) else {"table": _table(value, classes)}


def _is_json(value, deepest):
    kind = type(value)
    if value is None or kind is bool or kind is float or kind is str:
        return True
    if kind is int:
        return -(1 << 63) <= value < 1 << 63
    return kind is list and deepest > 0 and all(_is_json(item, deepest - 1) for item in value)


def _table(root, classes):
    nodes, numbers, kept, waiting = [], {}, [], []

    def number(value):
        key = id(value)
        if key not in numbers:
            numbers[key] = len(nodes)
            nodes.append(None)
            # Kept, so that no other object gets its identity.
            kept.append(value)
            waiting.append(value)
        return numbers[key]

    number(root)
    while waiting:
        value = waiting.pop()
        place = numbers[id(value)]
        # Subclasses count as what they are of: a defaultdict is a dict.
        if value is None or isinstance(value, (bool, float, str)):
            base = next((kind for kind in (bool, float, str) if isinstance(value, kind)), None)
            nodes[place] = ["value", value if base is None else base(value)]
        elif isinstance(value, int):
            nodes[place] = ["int", hex(value)]
        elif isinstance(value, dict):
            nodes[place] = ["dict", [number(key) for key in value.keys()], [number(item) for item in value.values()]]
        elif isinstance(value, (list, tuple, set, frozenset)):
            name = next(kind.__name__ for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
            nodes[place] = [name, [number(item) for item in value]]
        elif type(value).__name__ in classes:
            nodes[place] = ["object", type(value).__name__, {key: number(item) for key, item in vars(value).items()}]
        else:
            raise NotPlain(type(value).__name__)
    return nodes


def decode(data, namespace, classes):
    """The value of ``encode``; objects are of the classes that the namespace has under these names."""
    if "json" in data:
        value = data["json"]
        if not _is_json(value, _DEEPEST):
            raise NotPlain("a value of another kind")
        return value
    nodes, made = data["table"], {}

    def build(place):
        if place in made:
            return made[place]
        kind, content = nodes[place][0], nodes[place][1]
        if kind == "value":
            if not (content is None or type(content) in (bool, float, str)):
                raise NotPlain("a value of another kind")
            made[place] = content
        elif kind == "int":
            made[place] = int(content, 16)
        elif kind in ("list", "dict"):
            made[place] = [] if kind == "list" else {}
        elif kind == "object" and content in classes:
            # Its own __init__ is not run: the attributes say all.
            made[place] = object.__new__(namespace[content])
        elif kind in ("tuple", "set", "frozenset"):
            made[place] = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]([build(item) for item in content])
        else:
            raise NotPlain(str(kind))
        return made[place]

    for place in range(len(nodes)):
        build(place)
    for place, node in enumerate(nodes):
        if node[0] == "list":
            made[place].extend(made[item] for item in node[1])
        elif node[0] == "dict":
            made[place].update((made[key], made[item]) for key, item in zip(node[1], node[2]))  # noqa: B905
        elif node[0] == "object":
            for name, item in node[2].items():
                object.__setattr__(made[place], name, made[item])
    return made[0]


# -- both roles -------------------------------------------------------------------------------------------------------


class CarriedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules whose source came with the payload."""

    def __init__(self, sources):
        self.sources = sources

    def find_spec(self, name, path=None, target=None):
        if name not in self.sources:
            return None
        package = any(other.startswith(name + ".") for other in self.sources)
        return importlib.util.spec_from_loader(name, self, is_package=package)

    def exec_module(self, module):
        exec(compile(self.sources[module.__name__], module.__name__, "exec"), module.__dict__)


def read_all(number):
    """Everything that a file descriptor has."""
    with os.fdopen(number, "rb") as file:
        return file.read()


def limit(limits):
    """Hold the limits from here on; they cannot be raised again."""
    for name, (soft, hard) in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (soft, hard))


def private_channels():
    """Copies of input and output, which become nothing: what a program prints or reads goes nowhere."""
    reading, writing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    return os.fdopen(reading, "rb"), os.fdopen(writing, "wb")


def say(channel, words):
    """Write one object."""
    channel.write(json.dumps(words).encode() + b"\n")
    channel.flush()


def defined(source, name):
    """A module that has run this source, and the names of the classes that it defines."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, name, "exec"), module.__dict__)
    classes = [key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == name]
    return module.__dict__, classes


# -- the program ------------------------------------------------------------------------------------------------------


def run_program(payload):
    """Answer calls until there are no more."""
    calls, results = private_channels()
    sys.meta_path.append(CarriedModules(payload["modules"]))
    namespace, classes = defined(payload["prompt"], _MODULE)
    limit(payload["limits"])
    # From here on whatever fails is the program's doing.
    say(results, {"started": True})
    try:
        exec(compile(payload["program"], _MODULE, "exec"), namespace)
        candidate = eval(payload["entry_point"], namespace)
    except BaseException as error:
        say(results, {"raised": type(error).__name__})
        return
    for line in calls:
        arguments, named = decode(json.loads(line), namespace, classes)
        try:
            reply = {"result": encode(candidate(*arguments, **named), classes)}
        except NotPlain as error:
            reply = {"raised": "a result of type " + str(error)}
        except BaseException as error:
            reply = {"raised": type(error).__name__}
        say(results, reply)


# -- the checker ------------------------------------------------------------------------------------------------------


class ProgramFailed(Exception):
    """The program raised, ended, or said what is no value."""


def run_checker(payload, verdicts):
    """Say ``started`` once the program is about to run, then ``passed`` or why not."""
    results, calls = private_channels()
    verdicts = os.fdopen(verdicts, "wb")
    sys.meta_path.append(CarriedModules(payload["modules"]))
    try:
        namespace, classes = defined(payload["prompt"], _MODULE)
        exec(compile(payload["test"], "test", "exec"), namespace)
    except BaseException as error:
        say(verdicts, {"bad_gold": type(error).__name__ + ": " + str(error)[:200]})
        return
    limit(payload["limits"])
    most = payload["output_bytes"]

    def reply():
        line = results.readline(most + 1)
        if not line.endswith(b"\n"):
            raise ProgramFailed("too much output" if len(line) > most else "it ended")
        return json.loads(line)

    try:
        if reply() != {"started": True}:
            return
    except ProgramFailed:
        # No word of a start: its sandbox failed, which the host sees by the missing word.
        return
    say(verdicts, {"started": True})

    def candidate(*arguments, **named):
        try:
            say(calls, encode((arguments, named), classes))
        except BrokenPipeError:
            raise ProgramFailed(last_words()) from None
        answer = reply()
        if "result" not in answer:
            raise ProgramFailed("it raised " + str(answer.get("raised"))[:80])
        return decode(answer["result"], namespace, classes)

    def last_words():
        try:
            return "it raised " + str(reply().get("raised"))[:80]
        except (ProgramFailed, ValueError, AttributeError):
            return "it ended"

    try:
        namespace["check"](candidate)
        passed, note = True, ""
    except AssertionError:
        passed, note = False, "a test failed"
    except ProgramFailed as error:
        passed, note = False, str(error)
    except MemoryError:
        passed, note = False, "too much memory for its results"
    except BaseException as error:
        passed, note = False, "a test raised " + type(error).__name__
    say(verdicts, {"passed": passed, "note": note})


def main():
    """Play the role that the arguments name."""
    role, numbers = sys.argv[1], [int(number) for number in sys.argv[2:]]
    payload = json.loads(read_all(numbers[0]))
    if role == "program":
        run_program(payload)
    else:
        run_checker(payload, numbers[1])


if __name__ == "__main__":
    main()
