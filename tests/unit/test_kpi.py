"""The KPI's grammar: what is written comes back, a fault is shown where it stands, the grammar is the table's."""

from __future__ import annotations

import pytest
from eagleray.assure.decision_metrics import METRICS
from eagleray.assure.kpi import Constraint, Kpi, Objective, grammar, parse
from eagleray.core.errors import ConfigError
from eagleray.vision.prediction import Label
from hypothesis import given
from hypothesis import strategies as st

LABELS = (
    Label("ok", "fine"),
    Label("defect", "a defect"),
    Label("n01440764", "tench, Tinca"),
    Label("a b (c)", "twin"),
)
IDS = [label.id for label in LABELS]

shares = st.floats(0.001, 0.999).map(lambda value: float(f"{value:g}"))


@st.composite
def kpis(draw: st.DrawFn) -> Kpi:
    pairs = [(name, label) for name, m in METRICS.items() for label in ([*IDS, "*"] if m.is_per_label else [None])]
    chosen = draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=5, unique=True))
    constraints = tuple(Constraint(name, label, draw(shares), draw(shares)) for name, label in chosen)
    name, label = draw(st.sampled_from(pairs))
    return Kpi(constraints, Objective(name, () if label is None else (label,), draw(st.booleans())))


@given(kpis())
def test_what_is_written_comes_back(kpi: Kpi) -> None:
    assert parse(kpi.text, LABELS) == kpi


@given(kpis(), st.data())
def test_space_between_words_says_nothing(kpi: Kpi, data: st.DataObject) -> None:
    spaced = ""
    is_quoted = False
    for sign in kpi.text:
        is_quoted ^= sign == '"'
        gap = data.draw(st.sampled_from(["", " ", "  "])) if sign in "();@" and not is_quoted else ""
        spaced += gap + sign + gap
    assert parse(spaced, LABELS) == kpi


@given(st.text(alphabet='precisonall()<>=@.;*"0159 defctokmaxize\n', max_size=60))
def test_any_text_is_read_or_refused_at_a_column_that_it_has(text: str) -> None:
    fault = None
    try:
        parse(text, LABELS)
    except ConfigError as error:
        fault = error.seen
    if fault is not None:
        _, line, caret = fault.split("\n")
        assert len(line) == len(text) + 4
        assert 4 <= caret.index("^") <= len(text) + 4
        assert f"column {caret.index('^') - 3}:" in fault


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("precision(defect)>0.95", 18, "expected >="),
        ("precision(defect)<=0.95", 18, "bounded from below"),
        ("error_rate>=0.1", 11, "bounded from above"),
        ("precision(defect)>=", 20, "expected a value"),
        ("precision(defect)>=95", 20, "between 0 and 1"),
        ("precision(defect)>=0.95@95", 25, "a confidence between 0 and 1"),
        ("precison(defect)>=0.95", 1, "did you mean precision"),
        ("precision(defct)>=0.95", 11, "did you mean defect or a defect?"),
        ("precision(Defect)>=0.95", 11, "did you mean defect"),
        ("precision(moon)>=0.95", 11, "the labels are ok, defect"),
        ("precision>=0.95", 10, "and a label"),
        ("precision()>=0.95", 11, "expected a label"),
        ("precision(defect>=0.95", 23, "expected )"),
        ('precision("defect)>=0.95', 11, "does not end"),
        ("coverage(defect)>=0.5", 10, "takes no label"),
        ("precision(ok)>=0.9 recall(ok)>=0.5", 20, "expected ;"),
        ("precision(ok)>=0.9; precision(ok)>=0.8", 21, "second time"),
        ("precision(ok)>=0.9; maximize recall(ok); npv(ok)>=0.1", 40, "stands last"),
        ("precision(ok)>=0.9; maximise recall(ok)", 21, "did you mean maximize"),
        ("maximize recall(defect)", 24, "at least one constraint"),
        ("", 1, "expected a metric"),
        ("é(ok)>=0.5", 1, "expected a metric"),
    ],
)
def test_a_fault_is_shown_at_its_column_with_the_grammar(text: str, column: int, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, LABELS)
    assert f"column {column}: " in caught.value.seen
    assert said in caught.value.seen
    assert caught.value.seen.split("\n")[-1] == " " * (4 + column - 1) + "^"
    assert caught.value.expected == grammar()


def test_the_grammar_lists_every_metric_as_it_may_be_asked() -> None:
    lines = grammar().splitlines()
    for name, metric in METRICS.items():
        head = name + ("(LABEL|*)" if metric.is_per_label else "")
        assert sum(line.split()[:2] == [head, metric.op] for line in lines) == 1


def test_a_label_is_named_by_its_id_or_by_a_name_that_no_other_has() -> None:
    assert parse("precision(tench, Tinca)>=0.9", LABELS).constraints[0].label == "n01440764"
    with pytest.raises(ConfigError, match=r"2 labels are named 'x': a, b"):
        parse("precision(x)>=0.9", (Label("a", "x"), Label("b", "x")))


def test_what_is_not_said_follows() -> None:
    one = parse("precision(defect)>=0.9", LABELS)
    assert one.constraints[0].confidence == 0.95
    assert one.objective == Objective("recall", ("defect",), True)
    assert parse("error_rate(kept)<=0.1", LABELS).objective == Objective("coverage", (), True)
    assert parse("minimize cost", LABELS).constraints == ()
    assert parse("precision(ok)>=0.9;", LABELS).text == "precision(ok)>=0.9@0.95; maximize recall(ok)"


def test_a_star_is_each_label_that_the_images_have() -> None:
    kpi = parse("precision(*)>=0.9; recall(ok)>=0.5; maximize recall(*)", LABELS).over(("ok", "defect"))
    assert [(c.metric, c.label) for c in kpi.constraints] == [
        ("precision", "ok"),
        ("precision", "defect"),
        ("recall", "ok"),
    ]
    assert kpi.objective.labels == kpi.labels == ("ok", "defect")


@pytest.mark.parametrize(
    ("text", "wants"),
    [
        ("maximize recall(ok)", "more"),
        ("maximize precision(ok)", "fewer"),
        ("minimize recall(ok)", "fewer"),
        ("maximize specificity(ok)", "fewer"),
        ("maximize coverage", "more"),
        ("minimize abstention", "more"),
        ("minimize error_rate", "fewer"),
    ],
)
def test_an_objective_knows_which_way_it_pulls(text: str, wants: str) -> None:
    assert parse(f"npv(ok)>=0.5; {text}", LABELS).objective.wants == wants
