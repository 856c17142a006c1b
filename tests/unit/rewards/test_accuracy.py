"""The verifiers: tables of (reference, completion, verdict), and the spelling rules below them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest

from megatron_r1.rewards.accuracy import VERIFIERS, guarded, settle_math
from megatron_r1.rewards.canonical import canonical, number, same, vote_key
from megatron_r1.rewards.extract import extract_answer
from megatron_r1.rewards.workers import Job, VerifierPool
from megatron_r1.types import Prompt, Verdict


def prompt(answer: str | None, verifier: str = "math") -> Prompt:
    return Prompt(id="t:0", question="?", text="?", token_ids=[1], answer=answer, verifier=verifier)


def box(content: str) -> str:
    return rf"<think>some work, \boxed{{0}}</think> so it is \boxed{{{content}}}."


# (reference, whole completion, is it right)
MATH_CASES = [
    # numbers
    ("42", box("42"), True),
    ("42", box("42.0"), True),
    ("42", box("+42"), True),
    ("42", box("43"), False),
    ("-3", box("-3"), True),
    ("-3", box("3"), False),
    ("-3", box("\u22123"), True),  # a typographic minus sign
    ("7", box("007"), True),
    ("0.5", box(".5"), True),
    ("0", box("0.0000001"), False),
    ("12", box("1 2"), False),
    ("1000000", box("1,000,000"), True),
    ("1000000", box(r"1\,000\,000"), True),
    ("1000000", box("10^6"), True),
    ("1234", box("1{,}234"), True),
    ("1234", box("1,23,4"), False),
    ("1200", box(r"1.2\times 10^3"), True),
    ("2^{10}", box("1024"), True),
    ("10!", box("3628800"), True),
    (r"\binom{5}{2}", box("10"), True),
    # fractions, roots, constants
    (r"\frac{1}{2}", box("0.5"), True),
    (r"\frac{1}{2}", box("1/2"), True),
    (r"\frac{1}{2}", box(r"\dfrac12"), True),
    (r"\frac{1}{2}", box(r"\frac{2}{4}"), True),
    (r"-\frac{1}{2}", box(r"\frac{-1}{2}"), True),
    (r"\frac{1}{3}", box("0.333"), False),
    (r"\frac{1}{3}", box("0.333333"), False),
    (r"\frac{5}{2}", box(r"2\frac{1}{2}"), True),
    (r"\frac{\sqrt{3}}{3}", box(r"\frac{1}{\sqrt3}"), True),
    (r"\sqrt{8}", box(r"2\sqrt{2}"), True),
    (r"\sqrt{8}", box("2.828427"), False),
    (r"\pi", box("3.14159265"), False),
    (r"3+4i", box("4i+3"), True),
    # percent, units, money, degrees
    (r"25\%", box("25"), True),
    ("0.25", box(r"25\%"), True),
    ("24", box(r"25\%"), False),
    ("5", box(r"5\text{ cm}"), True),
    ("5 cm", box(r"5\text{ m}"), False),
    ("5 cm", box(r"5\,\mathrm{cm}"), True),
    ("10", box(r"\$10"), True),
    ("10", box("10 dollars"), True),
    ("90", box(r"90^\circ"), True),
    ("3", box("x=3"), True),
    ("y=3", box("x=3"), False),
    # tuples, sets, intervals, matrices
    ("(1,2)", box("(1, 2)"), True),
    ("(1,2)", box("(2,1)"), False),
    (r"\{1,2\}", box(r"\{2,1\}"), True),
    (r"\{1,2\}", box(r"\{1,2,3\}"), False),
    ("1,2,3", box("3,2,1"), True),
    ("[0,1)", box("[0,1)"), True),
    ("[0,1)", box("(0,1]"), False),
    ("(0,1)", box("0<x<1"), True),
    (r"(-\infty,2)", box("x<2"), True),
    (r"(-\infty, 1]\cup[2,\infty)", box(r"[2,\infty)\cup(-\infty,1]"), True),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        box(r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
        True,
    ),
    # expressions
    ("x^2+2x+1", box("(x+1)^2"), True),
    ("y=2x+1", box("2x+1"), True),
    ("x^2", box("y^2"), False),
    (r"\frac{n(n+1)}{2}", box(r"\frac{n^2+n}{2}"), True),
    (r"\ln 4", box(r"2\ln 2"), True),
    # words and full-width forms
    (r"\text{Yes}", box(r"\text{yes}"), True),
    (r"\text{No solution}", box("no solution"), True),
    ("Monday", box("Tuesday"), False),
    ("四十二", box("四十二"), True),
    ("42", box("４２"), True),  # noqa: RUF001 - full-width digits are the case
    ("42", "<answer>答案是42。</answer>", True),
    ("42", "<answer>答案是43。</answer>", False),
    ("42", "<answer>The answer is $42$.</answer>", True),
    # which answer is read
    ("42", r"\boxed{41} wait, \boxed{42}", True),
    ("42", r"\boxed{42} wait, \boxed{41}", False),
    ("42", r"\boxed{41\text{ or }42}", False),
    ("42", box("41, 42"), False),
    ("42", r"<think>maybe \boxed{42}</think> the answer is \boxed{7}", False),
    ("42", r"<answer>41} and \text{42</answer>", False),  # must not break out of the box
    ("3", r"\fbox{3}", True),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(2, deadline=20.0) as pool:
        yield pool


def test_math_table(pool: VerifierPool) -> None:
    jobs = []
    for reference, text, _ in MATH_CASES:
        answer = extract_answer(text)
        assert answer is not None, text
        jobs.append(Job(verifier="math", answer=answer, prompt=prompt(reference)))
    verdicts = pool.verify_many(jobs)
    wrong = [
        (reference, text, verdict)
        for (reference, text, right), verdict in zip(MATH_CASES, verdicts, strict=True)
        if verdict.status != ("correct" if right else "wrong")
    ]
    assert wrong == []
    # The shortcut never contradicts the verifier, and it is worth having.
    settled = [settle_math(job.answer, job.prompt) for job in jobs]
    for quick, verdict in zip(settled, verdicts, strict=True):
        assert quick is None or quick == verdict
    assert sum(quick is not None for quick in settled) > len(jobs) // 2


@pytest.mark.parametrize("reference", ["", None, "}{"])
def test_a_bad_reference_is_unknown_not_wrong(pool: VerifierPool, reference: str | None) -> None:
    [verdict] = pool.verify_many([Job(verifier="math", answer="42", prompt=prompt(reference))])
    assert verdict.status == "unknown"
    assert verdict.detail.startswith("ValueError: the ")
    assert verdict.extracted == "42"


@pytest.mark.parametrize(
    ("reference", "answer", "status"),
    [
        ("8", "8", "correct"),
        ("8", "+8", "correct"),
        ("8", "008", "correct"),
        ("8", "8.0", "correct"),
        ("8", "16/2", "correct"),
        ("8", " $8$. ", "correct"),
        ("-1", "-1", "correct"),
        ("-1", "1", "wrong"),
        ("1000", "1,000", "correct"),
        ("0.5", "1/2", "correct"),
        ("1/3", "0.333333", "wrong"),
        ("8", "5+3", "wrong"),
        ("8", "8%", "wrong"),
        ("8", "8 or 9", "wrong"),
        ("8", "8 9", "wrong"),
        ("8", "1e1", "wrong"),
        ("8", "eight", "wrong"),
        ("8", "", "wrong"),
        ("8", "8/0", "wrong"),
        ("8", "--8", "wrong"),
        ("1", "1" * 500, "wrong"),
        ("eight", "8", "unknown"),
        (None, "8", "unknown"),
    ],
)
def test_integer(reference: str | None, answer: str, status: str) -> None:
    assert guarded("integer", answer, prompt(reference, "integer")).status == status


@pytest.mark.parametrize(
    ("reference", "answer", "status", "extracted"),
    [
        ("B", "B", "correct", "B"),
        ("B", "b", "correct", "B"),
        ("B", "(B)", "correct", "B"),
        ("B", r"\text{(B)}", "correct", "B"),
        ("B", "B.", "correct", "B"),
        ("B", "B) Paris", "correct", "B"),
        ("B", "(B) Paris", "correct", "B"),
        ("B", "(B) vitamin C", "correct", "B"),
        ("B", "[B]", "correct", "B"),
        ("B", "B: Paris", "correct", "B"),
        ("B", "option B", "correct", "B"),
        ("B", "The answer is B", "correct", "B"),
        ("B", "选B", "correct", "B"),
        ("(b)", "B", "correct", "B"),
        ("B", "A", "wrong", "A"),
        ("B", "A or B", "wrong", "aorb"),
        ("B", "B. Paris or C. Rome", "wrong", "B.ParisorC.Rome"),
        ("B", "(B) or (c)", "wrong", "(B)or(c)"),
        ("B", "(B) or C", "wrong", "(B)orC"),
        ("B", "B), C)", "wrong", "B),C)"),
        ("B", "Bob", "wrong", "bob"),
        ("A", "A cat", "wrong", "acat"),
        ("B", "AB", "wrong", "AB"),
        ("I", "I", "unknown", "I"),
    ],
)
def test_choice(reference: str, answer: str, status: str, extracted: str) -> None:
    verdict = guarded("choice", answer, prompt(reference, "choice"))
    assert (verdict.status, verdict.extracted) == (status, extracted)


@pytest.mark.parametrize(
    ("reference", "answer", "status"),
    [
        ("Hello world", "hello  WORLD.", "correct"),
        ("Hello world", '"Hello world"', "correct"),
        ("Hello world", "Hello worlds", "wrong"),
        ("Hello world", "Helloworld", "wrong"),
        ("42", "42.0", "wrong"),
    ],
)
def test_exact(reference: str, answer: str, status: str) -> None:
    assert guarded("exact", answer, prompt(reference, "exact")).status == status


def test_what_a_verifier_raises_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Timeout(BaseException):
        pass

    def raises(answer: str, prompt: Prompt) -> Verdict:
        raise Timeout("too\nlate")

    monkeypatch.setitem(VERIFIERS, "raises", raises)
    verdict = guarded("raises", "042", prompt("42", "raises"))
    assert verdict == Verdict(status="unknown", extracted="42", detail="Timeout: too late")


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("42", Fraction(42)),
        ("-.5", Fraction(-1, 2)),
        ("5.", Fraction(5)),
        ("2/4", Fraction(1, 2)),
        ("-2/4", Fraction(-1, 2)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        (r"-\frac{-1}{2}", Fraction(1, 2)),
        ("1/0", None),
        ("--1/2", None),
        ("1e5", None),
        ("9" * 65, None),
        ("", None),
        ("٣", None),  # other scripts' digits
    ],
)
def test_number(spelling: str, value: Fraction | None) -> None:
    assert number(spelling) == value


def test_votes_count_equal_answers_together() -> None:
    assert {vote_key(a) for a in ("42", "042", "42.0", r"\frac{84}{2}", "$42$", "42.")} == {"42"}
    assert {vote_key(a) for a in (r"\dfrac12", "0.5", "1/2")} == {"1/2"}
    assert vote_key("x") != vote_key("X")
    assert vote_key("AB") != vote_key("ab")
    assert vote_key("No") == vote_key("no")
    assert vote_key("1 2") == "1 2"


def test_canonical_leaves_other_commands_alone() -> None:
    assert canonical(r"a \leftarrow b") == r"a\leftarrowb"
    assert canonical(r"\left( 1, 2 \right)") == "(1,2)"
    assert canonical("x²") == "x²"


def test_same_leaves_rounded_references_to_the_parser() -> None:
    assert same("1/3", "0.3333333333") is None
    assert same("0.34", "0.33") is False
    assert same("25%", "0.25") is None
