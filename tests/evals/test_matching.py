"""Whether a reply gives an expected answer: each kind of notation, and what must not count."""

from __future__ import annotations

import pytest

from vicugna.evals.matching import matches

YES = {
    "whole reply or words in it": [
        ("Ann Lee", "ann  lee"), ("Ann Lee", "It was Ann\nLee."), ("Paris", "**Paris**"),
        ("Paris", "_Paris_"), ("Paris", "a Paris-based firm"), ("Ann", "Ann's"),
        ("Paris", "The capital—Paris—is old"), ("foo_bar", "call foo_bar()"), ("C++", "I use C++"),
        ("C++", "C++11"), ("C#", "C# it is"), (".NET", ".NET"), ("O'Brien", "Mr. O’Brien"),
        ("A+", "a grade of A+."), ("AC/DC", "by AC/DC"), ("the", "The"), ("yes", "Yes, it is.")],
    "one letter": [
        ("B", "B"), ("B", "B."), ("B", "(B)"), ("B", "**B**"), ("B", "Answer: B"), ("b", "b"),
        ("B", "The answer is B."), ("B", "option B"), ("B", "Option B is right."),
        ("B", "B) Paris"),
        ("B", "B. Paris"), ("B", "The correct answer is: **(B)** Paris"), ("B", "**Answer:** B"),
        ("B", "I choose B because it fits"), ("B", r"So \boxed{B}"), ("B", r"$\boxed{\text{B}}$"),
        ("B", "Answer: B Paris"), ("A", "Answer: A"), ("A", "The answer is A because it is so"),
        ("A", "(A) A cat"), ("C", "The symbol of carbon is C."), ("B", "B is the correct answer"),
        ("B", "Not this: A\nAnswer: B"), ("B", "Reasons.\n\nB"), ("x", "x"), ("π", "π"),
        ("B", "A. Rome\nB. Paris\nThe answer is B"), ("Б", "Ответ: Б"), ("B", "答案是B。"),
        ("B", "答案：Ｂ"), ("(B)", "B"), ("I", "The answer is I."),
        ("D", "Therefore, D."), ("D", "I'd say D"), ("D", "I’d go with **D**."), ("D", "It's D."),
        ("D", "D, because it fits"), ("D", "La respuesta es D."), ("D", "정답은 D입니다")],
    "numbers": [
        ("4", "The answer is 4."), ("8715", "8715"), ("1,000", "1000"), ("1000", "1,000."),
        ("1000", "1\u202f000"), ("1000000", "1,000,000"), ("100000", "1,00,000"), ("1000", "1'000"),
        ("5", "5.0"), ("5.0", "5"), ("5.50", "It is 5.5"), ("-3", "−3"), ("-3", "it is –3"),
        ("−3", "-3"), ("5", "+5"), ("0.5", ".5"), (".5", "0.50"), ("3.5", "3,5"), ("1e3", "1000"),
        ("1000", "1e3"), ("6.02e23", "6.02 × 10^23"), ("6.02e23", "6.02·10²³"), ("1/2", "0.5"),
        ("½", "1/2"), ("1.5", "1½"), ("1/3", "⅓"), ("0.5", "1/2"), ("20", "२०"), ("20", "２０"),
        ("20", "٢٠"), ("5", "2+3=5"), ("5", "**5**"), ("5", "$5$"), ("42", "答えは42です"),
        ("10", "a 10-day trip"), ("5 km", "5.0 km"), ("May 5, 2020", "on May 5, 2020."),
        ("12345678901234567890", "12,345,678,901,234,567,890"), ("5", "No.5"), ("5", "(5)"),
        ("12000", "12 000"), ("1000000", "1 000 000"), ("1000000", "1.000.000"),
        ("1234.56", "1.234,56"), ("3/4", r"\boxed{\frac{3}{4}}"), ("2.5", "2 1/2"), ("2½", "2.5"),
        ("5 km", "5km"), ("5km", "5.0 km"), ("8 GB", "8GB"), ("100 °C", "100℃"), ("5", "5kg")],
    "units of numbers": [
        ("10%", "10"), ("10", "10%"), ("10%", "10 %"), ("10%", "10 percent"), ("$5", "5 dollars"),
        ("$5", "$5.00"), ("5", "$5"), ("-$5", "$-5"), ("€5", "5 €"), ("$1,000", "US$ 1,000")],
    "codes, dates, times": [
        ("007", "agent 007"), ("2024-05-01", "on 2024-05-01."), ("10:30", "at 10:30"),
        ("1.2.3", "version 1.2.3"), ("3-5", "3–5 days"), ("GPT-4", "GPT-4 did it"),
        ("10:30 AM", "10:30am"), ("5pm", "5 p.m."), ("1914-1918", "1914 – 1918"),
        ("3.5.1", "v3.5.1"), ("v3.5", "3.5")],
    "typographic signs": [
        ("don't", "I don’t"), ("don’t", "don't"), ("café", "cafe\u0301"), ("ﬁne", "fine"),
        ('a "b" c', "a “b” c"), ("x-ray", "x‑ray"), ("Ann Lee", "Ann\u00a0Lee"), ("H2O", "H₂O"),
        ("10^2", "10²"), ("ab", "a\u00adb"), ("STRASSE", "straße"), ("U.S.", "the US."),
        ("US", "the U.S. and Canada"), ("USA", "U.S.A"),
        ("J. R. R. Tolkien", "J.R.R. Tolkien"), ("❤️", "❤"), ("👍", "👍🏽")],
    "scripts without spaces": [
        ("東京", "東京です"), ("東京", "答えは東京です。"), ("กรุงเทพ", "คือกรุงเทพครับ"),
        ("ភ្នំពេញ", "គឺភ្នំពេញ"), ("서울", "서울입니다"), ("NHK", "それはNHKです"), ("水", "水です"),
        ("ວຽງຈັນ", "ແມ່ນວຽງຈັນ"), ("東京", "「東京」")],
    "punctuation alone": [("?", "?"), ("?", '"?"'), ("...", "..."), ("+", "+"), ("+", "`+`")],
    "capitals of function words": [
        ("US", "US"), ("US", "us"), ("US", "**us**."), ("US", "in the US"), ("WHO", "The WHO says"),
        ("May", "In May")],
}
NO = {
    "inside a longer word": [
        ("Ann Lee", "Joann Lee"), ("Ann Lee", ""), ("Lee", "Ann-Lee"), ("foo", "foo_bar"),
        ("can", "I can't"), ("cafe", "café"), ("दिल", "दिल्ली"), ("👨", "👨\u200d👩\u200d👧"),
        ("C+", "C++"), ("AA", "AA+"), ("F#", "F##"),
        (".NET", "the net"), (".NET", "network"), (".gitignore", "gitignore")],
    "one letter": [
        ("A", "a"), ("A", "a book"), ("B", "b"), ("C", "C++"), ("C", "I use C++."), ("C", "C#"),
        ("A", "A+"), ("A", "Answer: A+"), ("A", "Answer: A cat"), ("A", "A cat sat."),
        ("A", "The answer is a cat"), ("I", "I think so."), ("C", "Vitamin C helps"),
        ("O", "O'Brien"),
        ("B", "A. Rome\nB. Paris\nC. Bonn"), ("A", "The answer is B."), ("A", "(A) or (B)"),
        ("A", "A. Rome\nB. Paris\nThe answer is B"), ("s", "answers"), ("A", "Answer: B"),
        ("B", "")],
    "numbers": [
        ("4", "42"), ("5", "3.5"), ("5", "5.3"), ("3", "3.5"), ("1.5", "21.5"), ("5", "-5"),
        ("-5", "5"), ("1", "1,000"), ("000", "1,000"), ("5", "5th"), ("5", "COVID-5"), ("5", "x5"),
        ("5", "3-5"), ("2", "2+2"), ("5", "2024-05-01"), ("2024", "2024-05-01"), ("10", "10:30"),
        ("2", "1.2.3"), ("1", "1/2"), ("2", "1/2"), ("102", "10²"), ("10", "2^10"), ("3", "1e3"),
        ("1", "1½"), ("1/2", "2 1/2"), ("2", "2 1/2"), ("1000", "1.000.000"), ("5", "5x"),
        ("5", "5e9"), ("1/0", "1/2"), ("3", "H2O3"), ("1,000", "1.000")],
    "units of numbers": [("$5", "€5"), ("10%", "$10"), ("10%", "0.1"), ("10%", "100%")],
    "codes, dates, times": [
        ("007", "7"), ("7", "007"), ("02134", "2134"), ("10:30", "10:30:15"), ("1.2.3", "1.2.3.4"),
        ("1.2.3", "0.1.2.3"), ("GPT-4", "GPT-4.5"), ("GPT-4", "GPT-4o"), ("3-5", "13-5")],
    "punctuation alone": [("?", "What?"), ("+", "2 + 2"), ("...", "so..."), ("!", "")],
    "capitals of function words": [
        ("US", "Tell us more."), ("IT", "is it so?"), ("May", "It may be June"),
        ("WHO", "and who?"), ("IT", "it is so"), ("IT", "It is so."), ("US", "Us two"),
        ("In", "in France")],
}


@pytest.mark.parametrize(("answer", "reply"), [pair for pairs in YES.values() for pair in pairs])
def test_counts(answer: str, reply: str) -> None:
    assert matches(answer, reply)


@pytest.mark.parametrize(("answer", "reply"), [pair for pairs in NO.values() for pair in pairs])
def test_does_not_count(answer: str, reply: str) -> None:
    assert not matches(answer, reply)


@pytest.mark.parametrize("unit", [
    "a", " ", "1", "1,", "1e999 ", "(A) ", "answer ", ".", "_", "A.", "-", "1/", "東", "½", "$ ",
    "is ", "9" * 5000 + " ", "x 10^", "'", "\n", "a-", "**", "> "])
def test_long_replies_take_linear_time(unit: str) -> None:
    """A quadratic expression would need hours for these, and end by the test's time limit."""
    reply = (unit * 30_000)[:30_000]
    for answer in ("B", "aab", "17", "5 km", "東京"):
        assert not matches(answer, reply)
