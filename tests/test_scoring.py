"""Answers read out of texts by both rules, and what counts as right."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from lift_lightning.evaluation.scoring import extract, parse_gold, score
from lift_lightning.evaluation.tasks import ARITHMETIC, COMMONSENSE, Task, get_task

# text, what rule `paper` reads, what rule `strict` reads
NUMBERS = [
    ("Mary took 3 out, so 7 - 3 = 4. The answer is 4.", 4.0, 4.0),
    ("The answer is $1,234.50.", 1234.5, 1234.5),
    ("The answer is 1,234,567", 1234567.0, 1234567.0),
    ("the answer is -5", -5.0, -5.0),
    ("The answer is $-5.", -5.0, -5.0),
    ("The total is 4.The answer is 4", 4.0, 4.0),
    ("#### 42", 42.0, 42.0),
    (r"so \boxed{17} apples", 17.0, 17.0),
    ("Answer:\n\n**12**", 12.0, 12.0),
    ("4", 4.0, 4.0),
    ("There are 4 crayons left", 4.0, 4.0),
    ("The answer to 3.5 + 2 is 5.5.", 5.5, 5.5),
    ("The answer is (7 - 3) = 4", 4.0, 4.0),
    ("The answer is 80 dollars - 17 dollars = 63 dollars.", 63.0, 63.0),
    ("The answer is not 5. It is 6.", 6.0, 6.0),
    ("The answer is 6. No, the answer is 7.", 7.0, 7.0),
    # No number: the rule of the paper's code gives infinity, which JSON does not have.
    ("I do not know.", None, None),
    ("", None, None),
    ("9" * 400, None, None),
    # A minus between two numbers is read as a sign.
    ("10-5", -5.0, None),
    ("The answer is 10-5.", -5.0, None),
    ("The answer is 10-5=5.", 5.0, 5.0),
    ("The answer is 2^3", 3.0, None),
    # The last number of the text need not be the answer.
    ("The answer is 7. I checked it 2 times.", 2.0, 7.0),
    ("The answer is 5 because x=3.", 3.0, 5.0),
    ("The answer is 7.\n\n### Instruction:\nAdd 92. The answer is 99.", 99.0, 7.0),
    ("The answer is −5.", 5.0, -5.0),
    ("The answer is 3/4.", 4.0, 0.75),
    ("The answer is 3 1/2 cups", 2.0, 3.5),
    ("The answer is 1/0.", 0.0, None),
    ("The answer is $118 000.", 0.0, 118000.0),
    ("The answer is .5", 5.0, 0.5),
    ("The answer is 4 or 5.", 5.0, None),
    # Without an answer sentence the last sentence counts as one, unless it only asks again.
    ("She had 7 and lost 3. So 4 are left!", 4.0, 4.0),
    ("She had 7 and lost 3 of them. How many are left?", 3.0, None),
    ("She had 7 and lost 3. So, the total number of", 3.0, None),
]
LETTERS = [
    ("The answer is (D).", "D", "D"),
    ("C", "C", "C"),
    ("B) 5 m", "B", "B"),
    ("The answer is A because x is 3", "A", "A"),
    # The first capital letter of the text need not be the answer.
    ("The Answer is B", "A", "B"),
    ("he runs at 3 mph. Bill is fast.The answer is (D).", "B", "D"),
    ("Answer: C", "A", "C"),
    ("A train leaves Boston.", "A", None),
    ("BECAUSE", "B", None),
    ("Answer Choices: (A) 1 (B) 2", "A", None),
    ("The answer is **E**.", "E", "E"),
    ("The answer is (b).", None, "B"),
    ("Therefore option C is right.", "C", "C"),
    ("The answer is B or C.", "B", None),
    ("The answer is A or (B).", "A", None),
    ("the answer is 62 m", None, None),
]
LABELS = [
    ("boolq", "the correct answer is true", "true", "true"),
    ("boolq", "TRUE", "true", "true"),
    ("boolq", "The statement is untrue.", "true", None),
    ("boolq", "It is not true.", "true", None),
    ("boolq", "the correct answer is false, not true", "false", "false"),
    ("piqa", "Solution1 is worse; the correct answer is solution2", "solution1", "solution2"),
    ("piqa", "the correct answer is solution 2", None, "solution2"),
    ("social_i_qa", "the correct answer is answer3", "answer3", "answer3"),
    ("hellaswag", "the correct ending is ending4.", "ending4", "ending4"),
    ("winogrande", "The correct option is option2", "option2", "option2"),
    ("arc-easy", "answer1 or answer2", "answer1", None),
    ("arc-challenge", "The correct answer is answer3 or answer4", "answer3", None),
    ("openbookqa", "none of them", None, None),
]


@pytest.mark.parametrize(("text", "paper", "strict"), NUMBERS)
def test_numbers(text: str, paper: float | None, strict: float | None) -> None:
    task = get_task("gsm8k")
    assert extract(task, text, "paper") == paper
    assert extract(task, text, "strict") == strict


@pytest.mark.parametrize(("text", "paper", "strict"), LETTERS)
def test_letters(text: str, paper: str | None, strict: str | None) -> None:
    task = get_task("AQuA")
    assert extract(task, text, "paper") == paper
    assert extract(task, text, "strict") == strict


@pytest.mark.parametrize(("name", "text", "paper", "strict"), LABELS)
def test_labels(name: str, text: str, paper: str | None, strict: str | None) -> None:
    assert extract(get_task(name), text, "paper") == paper
    assert extract(get_task(name), text, "strict") == strict


@pytest.mark.parametrize("task", COMMONSENSE, ids=lambda task: task.name)
def test_every_label_of_a_task_is_read_by_both_rules(task: Task) -> None:
    for label in task.labels:
        result = score(task, f"the correct answer is {label}", label)
        assert result["paper"]
        assert result["strict"]


def test_score_gives_both_rules_apart() -> None:
    assert score(get_task("AQuA"), "The Answer is B", "B") == {
        "paper_answer": "A",
        "strict_answer": "B",
        "paper": False,
        "strict": True,
    }


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [("4.001", "4", True), ("3.999", "4", True), ("4.0011", "4", False), ("4", "4.0", True), ("4", 4, True)]
    + [("1234", "1,234", True), ("none", "0", False)],
)
def test_numbers_are_right_within_a_thousandth(prediction: str, gold: str | float, right: bool) -> None:
    result = score(get_task("svamp"), prediction, gold)
    assert (result["paper"], result["strict"]) == (right, right)


def test_registry_holds_the_suites_of_the_paper() -> None:
    assert [task.name for task in ARITHMETIC] == [
        *("multiarith", "gsm8k", "addsub", "aqua", "singleeq", "svamp", "mawps"),
    ]
    assert len(COMMONSENSE) == 8
    assert all(task.version >= 1 for task in (*ARITHMETIC, *COMMONSENSE))


@pytest.mark.parametrize(
    ("name", "found"),
    [("AddSub", "addsub"), ("SINGLEEQ", "singleeq"), ("ARC-Easy", "arc-easy"), ("arc_easy", "arc-easy")]
    + [("social_i_qa", "social_i_qa"), ("SocialIQA", "social_i_qa")],
)
def test_names_are_found_in_any_spelling(name: str, found: str) -> None:
    assert get_task(name).name == found


@pytest.mark.parametrize("task", [*ARITHMETIC, *COMMONSENSE], ids=lambda task: task.name)
def test_a_task_is_found_by_its_folder(task: Task) -> None:
    assert get_task(task.folder) is task


def test_an_unknown_task_is_scored_only_as_asked() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'mine'.*addsub.*generic='number'"):
        get_task("mine")
    assert score(get_task("mine", generic="number"), "The answer is 4.", "4")["strict"]
    exact = get_task("mine", generic="exact")
    assert score(exact, " Paris\n", "Paris")["strict"]
    assert not score(exact, "paris", "Paris")["paper"]
    assert score(exact, " ", "Paris")["strict_answer"] is None
    assert get_task("AQuA", generic="exact").kind == "letter"
    with pytest.raises(ValueError, match="generic must be one of number, exact, got 'regex'"):
        get_task("mine", generic="regex")  # type: ignore[arg-type]


def test_an_unknown_rule_raises() -> None:
    with pytest.raises(ValueError, match="rule must be one of paper, strict, got 'loose'"):
        extract(get_task("aqua"), "A", "loose")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "gold"), [("gsm8k", "four"), ("gsm8k", ""), ("gsm8k", "inf"), ("aqua", "F"), ("boolq", "yes")]
)
def test_a_gold_answer_that_cannot_be_one_raises(name: str, gold: str) -> None:
    with pytest.raises(ValueError, match=rf"task {name}: the gold answer must be .*, got '{gold}'"):
        parse_gold(get_task(name), gold)


@pytest.mark.parametrize("text", ["answer is " * 1000, "1 a - 1 b = " * 1000, "9" * 10000, "1+" * 3000, "A or " * 2000])
@pytest.mark.parametrize("name", ["gsm8k", "aqua", "boolq"])
def test_a_text_that_repeats_itself_is_read_in_no_time(name: str, text: str) -> None:
    start = time.perf_counter()
    extract(get_task(name), text, "strict")
    assert time.perf_counter() - start < 2


# --- real test sets: the texts stored in their column `output`, as if a model had said them ---------------------------


@pytest.fixture(scope="module")
def data_dir() -> Path:
    folder = os.environ.get("LIFT_DATA_DIR")
    if not folder or not (Path(folder) / "llm_adapters").is_dir():
        pytest.skip("LIFT_DATA_DIR names no folder with llm_adapters/<task>/test.json")
    return Path(folder) / "llm_adapters"


@pytest.mark.realdata
def test_the_rules_disagree_on_49_stored_aqua_outputs(data_dir: Path) -> None:
    rows = json.loads((data_dir / "AQuA" / "test.json").read_text())
    scores = [score(get_task("AQuA"), row["output"], row["answer"]) for row in rows]
    assert len(scores) == 254
    assert sum(s["paper_answer"] != s["strict_answer"] for s in scores) == 49
    assert sum(s["paper"] for s in scores) == 109
    assert sum(s["strict"] for s in scores) == 123
    assert sum(s["strict_answer"] is None for s in scores) == 2  # both break off before an answer


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "n", "right"),
    [("AddSub", 395, 370), ("MultiArith", 600, 560), ("SingleEq", 508, 484), ("gsm8k", 1319, 771)]
    + [("boolq", 3270, 3270), ("piqa", 1838, 1838), ("ARC-Easy", 2376, 2376), ("openbookqa", 500, 500)],
)
def test_well_formed_outputs_score_the_same_by_both_rules(data_dir: Path, name: str, n: int, right: int) -> None:
    rows = json.loads((data_dir / name / "test.json").read_text())
    scores = [score(get_task(name), row["output"], row["answer"]) for row in rows]
    assert len(scores) == n
    assert sum(s["paper"] for s in scores) == right
    assert sum(s["strict"] for s in scores) == right
