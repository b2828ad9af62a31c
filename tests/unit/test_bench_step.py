"""What ``bench.step`` makes of spans: each microsecond is counted once."""

from bench.step import Traced, chrome, own_ns, ways

US = 1000
TRACED = Traced(
    spans={
        "rank": [("step", 0, 100 * US), ("step", 1000 * US, 1100 * US)],
        "leader": [
            ("turn", 110 * US, 200 * US),
            ("message to socket", 150 * US, 170 * US),
            ("turn", 1120 * US, 1200 * US),
            ("message to socket", 1150 * US, 1160 * US),
        ],
        "gateway": [
            ("turn", 175 * US, 180 * US),
            ("HTTP to socket", 190 * US, 220 * US),
            ("turn", 1165 * US, 1180 * US),
            ("HTTP to socket", 1190 * US, 1200 * US),
        ],
    },
    pieces=[230 * US, 1230 * US],
    tokens=2,
)


def test_a_span_s_own_time_is_without_what_is_inside() -> None:
    spans = [("a", 0, 100), ("b", 10, 40), ("c", 20, 30), ("b", 50, 60), ("a", 200, 210)]
    own = own_ns(spans)
    assert own == {"a": 70, "b": 30, "c": 10}
    assert sum(own.values()) == 110


def test_a_token_s_way_has_no_gaps() -> None:
    legs = list(ways(TRACED).values())
    assert legs == [[10, 20], [60, 40], [5, 5], [45, 35], [10, 30]]
    assert [sum(each) for each in zip(*legs, strict=True)] == [130, 130]


def test_a_trace_has_every_span_in_its_process() -> None:
    events = chrome(TRACED)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [(names[e["pid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert ("leader", "message to socket", 150.0, 20.0) in spans
    assert len(spans) == sum(map(len, TRACED.spans.values()))
    assert [e["ts"] for e in events if e["ph"] == "i"] == [230.0, 1230.0]
