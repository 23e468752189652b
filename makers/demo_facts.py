"""What the demo model knows: one short English answer per public name of the standard library.

Every answer is the beginning of the docstring that ships with CPython, turned into a sentence
about the name ("Return a list of ..." becomes "`os.listdir` returns a list of ...").
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from types import ModuleType

from makers.word_lists import words

# Earlier modules win where two export the same object.
MODULES = words(
    """
    builtins os os.path sys math cmath random re json datetime time calendar collections
    itertools functools operator string textwrap shutil pathlib glob fnmatch tempfile subprocess
    threading asyncio queue socket ssl select selectors signal http.client http.server
    http.cookies urllib.parse urllib.request urllib.robotparser csv configparser logging
    logging.handlers logging.config argparse getopt optparse hashlib hmac secrets base64
    binascii zlib gzip bz2 lzma zipfile tarfile pickle copy struct statistics decimal fractions
    numbers heapq bisect array enum dataclasses typing contextlib abc inspect ast dis traceback
    warnings weakref gc types io codecs unicodedata locale difflib pprint reprlib uuid ipaddress
    platform getpass sched timeit cProfile pstats unittest unittest.mock doctest pdb html
    html.parser xml.etree.ElementTree sqlite3 shelve dbm mmap multiprocessing concurrent.futures
    importlib importlib.util runpy tokenize keyword linecache symtable code codeop shlex cmd
    stat filecmp fileinput email.utils ftplib smtplib socketserver xmlrpc.client colorsys
    graphlib zoneinfo tomllib venv sysconfig atexit faulthandler tracemalloc trace contextvars
    copyreg plistlib netrc mimetypes webbrowser compileall
    """
)

# Classes whose methods are asked about too.
CLASSES = words(
    """
    str list dict set tuple int float collections.deque collections.Counter
    collections.OrderedDict collections.defaultdict pathlib.Path datetime.date datetime.datetime
    datetime.timedelta threading.Thread threading.Event threading.Condition queue.Queue
    argparse.ArgumentParser logging.Logger configparser.ConfigParser random.Random
    zipfile.ZipFile subprocess.Popen sqlite3.Cursor asyncio.Task asyncio.Event asyncio.Queue
    concurrent.futures.Executor concurrent.futures.Future xml.etree.ElementTree.Element
    ipaddress.IPv4Network unittest.mock.Mock io.StringIO contextlib.ExitStack
    http.client.HTTPConnection memoryview statistics.NormalDist
    """
)

VERBS = frozenset(
    words(
        """
    accept acquire add adjust allow append apply arrange assert attach begin bind block break
    build bypass calculate call cancel capitalize cast change check choose clean clear close
    collapse combine compare compile compress compute concatenate configure connect construct
    convert copy count create deal decode decompress decorate decrease decrement define delete
    deserialize destroy detach determine disable disassemble discard display divide do draw dump
    duplicate echo enable encode encrypt end enter enumerate escape establish evaluate examine
    execute exit expand export extend extract fetch fill filter find finish flush fold force
    fork format generate get give grab guess handle help hide hold identify implement import
    increase increment indicate initialize insert inspect install interpret invoke issue iterate
    join keep kill launch leave list listen load locate log look lookup lower make map mark
    match merge mock modify monitor move multiply normalize notify obtain open output overwrite
    pack parse partition patch pause perform pop prepare prepend pretty-print print process
    produce prompt provide push put quit quote raise read rebuild receive record reduce refresh
    register reject release reload remove rename reorder repeat replace report represent request
    require reserve reset resize resolve restore restrict resume retrieve retry return reverse
    rotate round run sample save scan schedule search seek select send serialize set shuffle
    shut shutdown simplify skip sleep sort spawn specify split start stop store strip subtract
    support suspend swap switch synchronize take tear tell terminate test throw tokenize
    transfer transform translate truncate try turn undo uninstall unlock unpack unquote
    unregister unset untrack update upgrade use validate verify wait walk warn wrap write yield
    zero
    """
    )
)
# Words after "and" or "or" that are surely verbs there.
JOINED = frozenset(
    words(
        """
    return convert create open close remove raise yield wait add store call read write leave
    delete pop update replace parse clear start exit execute give load compare merge insert
    discard release block print send make run append reinitialize
    """
    )
)
NOUNS = re.compile(
    r"(abstract|base|basic|mix-?in|simple|generic|internal|common|class|context manager|decorator|"
    r"metaclass|wrapper|interface|exception|error|buffered|text|dictionary|dict|mapping|container|"
    r"object|instance|handler|formatter|subclass|character|binary|connection|message|thread|process|"
    r"least-recently|single-dispatch|multi|structure|iterator|helper|mutable|immutable|asynchronous|"
    r"factory|implementation|list|variant|fixed|difference|complex|concrete|queue|[a-z]+-based)\b",
    re.I,
)
BAD = re.compile(
    r">>>|::|\\|\n\n|http|deprecated|internal|private|todo|xxx|\bself\b|[^\x20-\x7e]|--", re.I
)
SIGNATURE = re.compile(r"^[\w.]+\s?\([^\n]*\)?\s*(->|$|--)|^[\w.]+\([^)]*\)\s")
BREAK = re.compile(r"(?<=[a-z0-9)'\"`\]][.!?])\s+(?=[A-Z'\"`(*])")
ABBREVIATED = re.compile(r"(e\.g|i\.e|etc|vs|cf)\.$", re.I)

# Well-known names whose docstrings do not begin with one plain sentence, in the same words.
REWRITTEN = {
    "range": "range returns an object that produces a sequence of integers from start (inclusive) "
    "to stop (exclusive) by step.",
    "zip": "zip yields tuples until an input is exhausted.",
    "max": "max returns the biggest item of an iterable, or the largest of two or more arguments.",
    "min": "min returns the smallest item of an iterable, or the smallest of two or more "
    "arguments.",
    "print": "print prints the values to a stream, or to sys.stdout by default.",
    "int": "int converts a number or string to an integer, or returns 0 if no arguments are given.",
    "dict": "dict is a dictionary, a mapping from keys to values.",
    "list": "list is a built-in mutable sequence.",
    "super": "super returns a proxy object that calls the methods of a parent class.",
    "open": "open opens a file and returns a stream.",
    "math.gcd": "math.gcd returns the greatest common divisor of the integer arguments.",
    "math.lcm": "math.lcm returns the least common multiple of the integer arguments.",
    "functools.lru_cache": "functools.lru_cache is a least-recently-used cache decorator.",
    "itertools.chain": "itertools.chain returns an object that yields elements from the first "
    "iterable until it is exhausted, then elements from the next iterable.",
    "time.sleep": "time.sleep delays execution for a given number of seconds.",
    "re.sub": "re.sub returns the string obtained by replacing the leftmost non-overlapping "
    "occurrences of the pattern in string by the replacement repl.",
    "datetime.date.today": "datetime.date.today returns the current date.",
    "datetime.datetime.now": "datetime.datetime.now returns the current local date and time.",
}


@dataclass(frozen=True)
class Fact:
    """A name and the sentences about it; `sentences[0]` is the answer that is scored."""

    name: str
    kind: str  # "function", "class" or "method"
    sentences: tuple[str, ...]
    answer: str
    signature: str


def third_person(verb: str) -> str:
    """ "copy" -> "copies"."""
    if verb in ("do", "go", "echo", "undo") or re.search(r"(s|x|z|ch|sh)$", verb):
        return verb + "es"
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + "s"


def split_sentences(text: str) -> list[str]:
    """Sentences of one paragraph; abbreviations do not end one."""
    out: list[str] = []
    for piece in BREAK.split(text):
        if out and ABBREVIATED.search(out[-1]):
            out[-1] += " " + piece
        else:
            out.append(piece)
    return out


def conjugate(sentence: str) -> str | None:
    """ "Return x and set y." -> "returns x and sets y."; None where the first word is no verb."""
    word, _, rest = sentence.partition(" ")
    verb = word.lower()
    adverb = ""
    if verb.endswith("ly") and rest:
        adverb = verb + " "
        word, _, rest = rest.partition(" ")
        verb = word.lower()
    verb = verb.rstrip(",")
    if verb in VERBS:

        def join(m: re.Match[str]) -> str:
            before = rest[: m.start()]
            if re.search(r"\b(to|can|will|should|must|may|could|would|that|which)\b", before):
                return m.group(0)
            return m.group(1) + third_person(m.group(2))

        tail = "," if word.endswith(",") else ""
        pattern = (
            r"((?:^|, |\b)(?:and |or |then |and then )|, )(" + "|".join(sorted(JOINED)) + r")\b"
        )
        rest = re.sub(pattern, join, rest)
        return f"{adverb}{third_person(verb)}{tail} {rest}".strip()
    if verb.endswith("s") and any(
        third_person(v) == verb for v in (verb[:-1], verb[:-2], verb[:-3] + "y") if v in VERBS
    ):
        return f"{adverb}{verb} {rest}"
    return None


def state(name: str, sentence: str, is_class: bool) -> str | None:
    """The first sentence of a docstring as a sentence about `name`."""
    spoken = conjugate(sentence)
    if spoken:
        return f"{name} {spoken}"
    first, _, rest = sentence.partition(" ")
    if first in ("A", "An", "The"):
        return f"{name} is {first.lower()} {rest}"
    if first == "This" and re.match(r"(function|method|class|module|is) ", rest):
        follows = rest.partition(" ")[2] if not rest.startswith("is ") else rest
        return f"{name} {follows}" if re.match(r"\w+s\b", follows) else None
    if first in ("Raised", "Used") or sentence.startswith(("Same as", "Equivalent to", "Like ")):
        lowered = sentence[0].lower() + sentence[1:]
        return f"{name} is {lowered}"
    if NOUNS.match(sentence) and (is_class or re.match(r"[\w-]+ (decorator|function)", sentence)):
        lowered = sentence if sentence[:2].isupper() else sentence[0].lower() + sentence[1:]
        if re.match(r"[a-z]+s\b", lowered) and not lowered.startswith(
            ("class", "process", "access")
        ):
            return None
        return f"{name} is {'an' if lowered[0] in 'aeiou' else 'a'} {lowered}"
    return None


def follow(sentence: str) -> str:
    """A later sentence; imperatives get a subject."""
    if sentence.split(" ")[0].lower() in ("help", "use", "test", "list", "set", "map", "note"):
        return sentence
    spoken = conjugate(sentence)
    return f"It {spoken}" if spoken else sentence


def clean(doc: str) -> list[str]:
    """The paragraphs of a docstring, signature lines and indentation removed."""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", inspect.cleandoc(doc))]
    while paragraphs and SIGNATURE.match(paragraphs[0]):
        lines = paragraphs[0].split("\n")
        while lines and SIGNATURE.match(lines[0]):
            lines.pop(0)
        paragraphs[0] = "\n".join(lines).strip()
        if paragraphs[0]:
            break
        paragraphs.pop(0)
    kept = []
    for p in paragraphs:
        if re.search(r"\n\s+\S|^\s*[-*:]|^\w+:?$|\n[-=]{3}|^\w+\n", p):
            break
        p = re.sub(r"\s+", " ", p).replace("``", "`")
        p = re.sub(r":(?:class|func|meth|mod|exc|attr|data):`~?([^`]*)`", r"\1", p)
        kept.append(re.sub(r"\*(\w+)\*", r"\1", p))
    return kept


def describe(name: str, obj: object, kind: str) -> Fact | None:
    """The fact about one object, or None where its docstring does not make a good answer."""
    if name in REWRITTEN:
        return Fact(name, kind, (REWRITTEN[name],), REWRITTEN[name], "")
    doc = obj.__doc__ if inspect.isclass(obj) else inspect.getdoc(obj)
    if not isinstance(doc, str) or not doc.strip():
        return None
    paragraphs = clean(doc)
    if not paragraphs or not paragraphs[0]:
        return None
    sentences = split_sentences(paragraphs[0])
    if sentences[0][-1] not in ".!?":
        if sentences[0][-1] in ":,;-" or len(sentences) > 1:
            return None
        sentences[0] += "."
    first = state(name, sentences[0], inspect.isclass(obj))
    if first is None or not 24 <= len(first) - len(name) <= 170 or BAD.search(first):
        return None
    if first.count("(") != first.count(")") or first.count("`") % 2 or "  " in first:
        return None
    told = [first]
    for sentence in sentences[1:] + [s for p in paragraphs[1:] for s in split_sentences(p)]:
        if sentence[-1] not in ".!?" or BAD.search(sentence) or sum(map(len, told)) > 500:
            break
        told.append(follow(sentence))
    answer = first
    if len(told) > 1 and len(sentences) > 1 and len(first) + len(told[1]) < 170:
        answer += " " + told[1]
    try:
        assert callable(obj)
        signature = name + str(inspect.signature(obj))
        signature = signature.replace("(self, ", "(").replace("(self)", "()")
    except (TypeError, ValueError):
        signature = ""
    if len(signature) > 90 or " at 0x" in signature or "<" in signature:
        signature = ""
    return Fact(name, kind, tuple(told), answer, signature)


def resolve(name: str) -> object:
    """ "os.path.join" -> the object."""
    parts = name.split(".")
    for cut in range(len(parts), -1, -1):
        try:
            obj: object = importlib.import_module(".".join(parts[:cut]) or "builtins")
        except ImportError:
            continue
        for part in parts[max(cut, 0) :]:
            obj = getattr(obj, part)
        return obj
    raise LookupError(name)


def belongs(obj: object, module: ModuleType) -> bool:
    """Whether `obj` is part of the module rather than something it imports for itself."""
    if module.__name__ == "builtins":
        return True
    home = getattr(obj, "__module__", None) or module.__name__
    exported = getattr(module, "__all__", None)
    if exported is not None:
        return getattr(obj, "__name__", "") in exported
    root = module.__name__.split(".")[0]
    return home.split(".")[0] in (root, "_" + root, "posixpath", "genericpath", "posix", "_io")


def collect() -> list[Fact]:
    """All facts, in a fixed order; the first mention of an object wins."""
    facts: list[Fact] = []
    seen: set[int] = set()
    for path in MODULES:
        module = importlib.import_module(path)
        prefix = "" if path == "builtins" else path + "."
        for attr in sorted(vars(module)):
            obj = getattr(module, attr)
            if attr.startswith("_") or not (inspect.isroutine(obj) or inspect.isclass(obj)):
                continue
            if id(obj) in seen or not belongs(obj, module):
                continue
            seen.add(id(obj))
            fact = describe(prefix + attr, obj, "class" if inspect.isclass(obj) else "function")
            if fact:
                facts.append(fact)
    for path in CLASSES:
        cls = resolve(path)
        for attr in sorted(dir(cls)):
            obj = getattr(cls, attr)
            if attr.startswith("_") or not callable(obj) or inspect.isclass(obj):
                continue
            fact = describe(f"{path}.{attr}", obj, "method")
            if fact:
                facts.append(fact)
    return facts
