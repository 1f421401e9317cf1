"""A hundred beginnings of Python functions, and what counts as completing one.

The model continues each head greedily. The function ends before the first line indented no further than its `def` (a
head that opens a class only: its `class`), or where the model ends the text. Where neither comes within NEW_TOKENS
tokens, it is cut after its last full line. It is complete if `ast.parse` accepts head and continuation together, the
body holds more than docstring, `pass`, `...` and `raise NotImplementedError`, and its tokens do not loop.
"""

import ast
import bisect
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NEW_TOKENS = 256
LOOP = 20  # so many tokens that only repeat what stands right before them are a loop

# signature, docstring
_FUNCTIONS = (
    ("read_lines(path)", "Return the lines of a file."),
    ("count_words(text)", "Return a dictionary of words and how often each occurs."),
    ("is_palindrome(text)", "Tell whether the text reads the same backwards."),
    ("flatten(items)", "Return one list with the elements of all nested lists."),
    ("factorial(n)", "Return the product of 1 to n."),
    ("greatest_common_divisor(a, b)", "Return the largest number that divides both a and b."),
    ("fibonacci(n)", "Return a list of the first n Fibonacci numbers."),
    ("is_prime(number)", "Return True if the number is prime."),
    ("mean(values)", "Return the arithmetic mean of a sequence of numbers."),
    ("median(data)", "Return the median of the data."),
    ("clamp(value, low, high)", "Limit the value to the range from low to high."),
    ("reverse_string(s)", "Return the string reversed."),
    ("unique(iterable)", "Yield each element once, in order of first appearance."),
    ("chunks(sequence, size)", "Split the sequence into pieces of the given size."),
    ("merge_dicts(first, second)", "Return a new dictionary with the keys of both."),
    ("invert(mapping)", "Return a dictionary that maps values to keys."),
    ("find_files(directory, pattern)", "Return the paths below the directory that match the pattern."),
    ("file_size(filename)", "Return the size of a file in bytes."),
    ("copy_file(source, target)", "Copy a file."),
    ("remove_tree(path, ignore_errors=False)", "Delete a directory and everything in it."),
    ("parse_header(line)", "Split a header line into its name and its value."),
    ("parse_query(query, separator='&')", "Parse a query string into a list of pairs."),
    ("join_url(base, path)", "Join a base address and a path."),
    ("escape(s, quote=True)", "Replace special characters by HTML entities."),
    ("strip_comments(source)", "Remove comments from the source code."),
    ("to_hex(data)", "Return the bytes as a string of hexadecimal digits."),
    ("from_hex(text)", "Return the bytes that a string of hexadecimal digits stands for."),
    ("checksum(data)", "Return the sum of all bytes modulo 256."),
    ("load_config(filename, defaults=None)", "Read a configuration file and return its options."),
    ("get_option(options, name, default=None)", "Return the value of an option, or the default."),
    ("walk(node)", "Yield the node and all its descendants."),
    ("format_time(seconds)", "Return the duration as hours, minutes and seconds."),
    ("parse_date(string)", "Parse a date and return a tuple of year, month and day."),
    ("is_leap(year)", "Return True for leap years, False for other years."),
    ("days_in_month(year, month)", "Return the number of days of a month."),
    ("indent(text, prefix)", "Add the prefix to the beginning of each line."),
    ("wrap(text, width=70)", "Break a paragraph into lines of at most width characters."),
    ("first(iterable, default=None)", "Return the first item, or the default if there is none."),
    ("compose(*functions)", "Return a function that applies all functions, one after another."),
    ("memoize(function)", "Decorator that remembers the results of a function."),
    ("retry(function, attempts=3)", "Call the function again until it raises no exception."),
    ("run_command(command, cwd=None)", "Run a command and return its output."),
    ("getenv(key, default=None)", "Return an environment variable or the default."),
    ("connect(host, port, timeout=None)", "Open a connection and return the socket."),
    ("send_all(sock, data)", "Send all the data through the socket."),
    ("main(argv=None)", "Parse the arguments of the command line and run the program."),
    ("usage(message=None)", "Print a help text and exit."),
    ("dump(obj, file)", "Write the object to an open file."),
    ("compare_versions(a, b)", "Compare two version strings and return -1, 0 or 1."),
    ("binary_search(items, key)", "Return the index of the key in a sorted list, or -1."),
    ("insertion_sort(items)", "Sort the list in place."),
    ("transpose(matrix)", "Return the matrix with rows and columns exchanged."),
    ("dot(u, v)", "Return the sum of the products of both vectors."),
    ("word_count(text: str) -> int", "Return the number of words."),
    ("split_pairs(text: str, sep: str = '=') -> dict", "Parse lines of keys and values."),
)  # fmt: skip
_BARE = (
    "add(a, b)", "get_name(self)", "write_bytes(path, data)", "quote(s)", "max_of_three(a, b, c)",
    "decode(data, encoding)", "isdir(path)", "close_all(files)", "print_table(rows)", "normalize(name)",
)  # fmt: skip
# class, its docstring, method, its docstring
_METHODS = (
    ("Stack", "A last-in, first-out collection.", "push(self, item)", "Put an item on top of the stack."),
    ("Stack", "A last-in, first-out collection.", "pop(self)", "Remove the item on top and return it."),
    ("Queue", "A first-in, first-out queue.", "get(self, block=True, timeout=None)", "Remove and return an item."),
    ("Counter", "Counts things.", "update(self, iterable)", "Count the elements of the iterable."),
    ("Point", "A point in the plane.", "__init__(self, x, y)", "Make a point of its two coordinates."),
    ("Point", "A point in the plane.", "__repr__(self)", "Return a string that describes the point."),
    ("Point", "A point in the plane.", "__eq__(self, other)", "Tell whether two points are the same."),
    ("Vector", "A vector of numbers.", "__add__(self, other)", "Return the sum of two vectors."),
    ("Cache", "A mapping that forgets the oldest keys.", "__getitem__(self, key)", "Return the value of a key."),
    ("Cache", "A mapping that forgets the oldest keys.", "clear(self)", "Remove everything."),
    ("Node", "A node of a tree.", "add_child(self, child)", "Append a child to this node."),
    ("Node", "A node of a tree.", "depth(self)", "Return the number of ancestors of this node."),
    ("Parser", "Reads expressions.", "error(self, message)", "Raise an exception with the position of the error."),
    ("Parser", "Reads expressions.", "next_token(self)", "Return the next token, or None at the end."),
    ("Logger", "Writes messages to a stream.", "log(self, level, msg, *args)", "Log a message with the given level."),
    ("Connection", "A connection to a server.", "close(self)", "Close the connection."),
    ("Connection", "A connection to a server.", "send(self, data)", "Send data to the server."),
    ("Reader", "Reads records from a file.", "__iter__(self)", "Yield one record after another."),
    ("Reader", "Reads records from a file.", "readline(self, size=-1)", "Read and return one line."),
    ("Timer", "Calls a function later.", "start(self)", "Start the timer."),
    ("Timer", "Calls a function later.", "__exit__(self, exc_type, exc_value, traceback)", "Stop the timer."),
    ("Account", "A bank account.", "withdraw(self, amount)", "Take money from the account."),
    ("Matrix", "A matrix of numbers.", "__len__(self)", "Return the number of rows."),
    ("Formatter", "Turns records into text.", "format(self, record)", "Return the record as text."),
    ("Registry", "Functions by name.", "register(self, name, function)", "Add a function under a name."),
)  # fmt: skip
_METHODS_BARE = (
    ("Rectangle", "A rectangle.", "area(self)"),
    ("Person", "A person with a name and an age.", "__init__(self, name, age)"),
    ("Buffer", "Bytes that grow.", "write(self, data)"),
    ("Server", "A server for requests.", "handle_request(self, request)"),
    ("Iterator", "Goes through a sequence.", "__next__(self)"),
    ("Task", "A unit of work.", "cancel(self)"),
)
_CLASSES = (
    ("ParseError(Exception)", "Raised when the input cannot be parsed."),
    ("Color", "A color of three components."),
    ("LinkedList", "A list of linked nodes."),
    ("Lock", "A lock for threads."),
)

HEADS: tuple[str, ...] = (
    *(f'def {signature}:\n    """{doc}"""\n' for signature, doc in _FUNCTIONS),
    *(f"def {signature}:\n" for signature in _BARE),
    *(
        f'class {name}:\n    """{about}"""\n\n    def {signature}:\n        """{doc}"""\n'
        for name, about, signature, doc in _METHODS
    ),
    *(f'class {name}:\n    """{about}"""\n\n    def {signature}:\n' for name, about, signature in _METHODS_BARE),
    *(f'class {name}:\n    """{about}"""\n' for name, about in _CLASSES),
)


@dataclass(frozen=True)
class Score:
    """`complete` heads of `total`, `ended` of which needed no cut; `failures`: index of a head, what is wrong."""

    total: int
    complete: int
    ended: int
    failures: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        reasons = Counter(reason for _, reason in self.failures)
        return f"{self.complete} of {self.total} complete, {self.ended} of them ended in time; {dict(reasons)}"


def score_heads(
    generate: Callable[[list[str]], Sequence[Sequence[int]]],
    decode: Callable[[Sequence[int]], str],
    heads: Sequence[str] = HEADS,
    new_tokens: int = NEW_TOKENS,
) -> Score:
    """How many heads are completed. `generate` gives at most `new_tokens` greedy tokens for each; fewer: it ended."""
    complete = ended = 0
    failures = []
    for index, (head, ids) in enumerate(zip(heads, generate(list(heads)), strict=True)):
        ends, reason = judge(head, list(ids), decode, len(ids) < new_tokens)
        if reason is None:
            complete, ended = complete + 1, ended + ends
        else:
            failures.append((index, reason))
    return Score(len(heads), complete, ended, tuple(failures))


def judge(head: str, ids: list[int], decode: Callable[[Sequence[int]], str], finished: bool) -> tuple[bool, str | None]:
    """Whether the function ends, and why it is not complete (None if it is). `finished`: the model ended the text."""
    count = bisect.bisect_left(range(len(ids) + 1), True, key=lambda n: body_end(head, decode(ids[:n])) is not None)
    text = decode(ids)
    end = body_end(head, text)
    if loops(ids[:count]):
        return end is not None, "loop"
    ends = finished or end is not None
    if end is None:
        end = len(text) if finished else text.rfind("\n") + 1
    return ends, defect(head, text[:end])


def body_end(head: str, continuation: str) -> int | None:
    """Where the first line begins that is indented no further than the head's last `def` or `class`; None: nowhere."""
    opening = _opening_line(head)
    limit = len(opening) - len(opening.lstrip())
    position = 0
    for line in continuation.split("\n"):
        if line.strip() and len(line) - len(line.lstrip()) <= limit:
            return position
        position += len(line) + 1
    return None


def loops(ids: Sequence[int]) -> bool:
    """Do some tokens repeat those right before them, for at least LOOP tokens on end?"""
    for period in range(1, len(ids) // 2 + 1):
        run = 0
        for i in range(period, len(ids)):
            run = run + 1 if ids[i] == ids[i - period] else 0
            if run >= max(LOOP, period):
                return True
    return False


def defect(head: str, continuation: str) -> str | None:
    """What is wrong with a completed function: "syntax", "trivial", or None."""
    line = head[: head.rindex(_opening_line(head))].count("\n") + 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a string is no error
            tree = ast.parse(head + continuation)
    except (SyntaxError, RecursionError, MemoryError):
        return "syntax"
    kinds = (ast.FunctionDef, ast.ClassDef)
    (target,) = (node for node in ast.walk(tree) if isinstance(node, kinds) and node.lineno == line)
    return "trivial" if all(_says_nothing(statement) for statement in target.body) else None


def _opening_line(head: str) -> str:
    return [line for line in head.splitlines() if line.lstrip().startswith(("def ", "class "))][-1]


def _says_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise):
        return "NotImplementedError" in ast.unparse(statement)
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
