"""Monitoring as it ships: rules that ring when something is wrong, and a real Prometheus that scrapes a real server."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.program import ROOT, Program, eventually, free_ports, installation

SHIPPED: Final = ROOT / "deploy" / "prometheus"
RULES: Final = SHIPPED / "alerts.yml"
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "dashboard.json"
TOKEN: Final = "a-token-for-the-scraper-of-ours"
_COMPARED: Final = re.compile(r" (>=|<=|==|!=|>|<) ")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus"),
]


def alerts() -> dict[str, str]:
    """Alert → its expression, as promtool's YAML is: one line, or folded below `expr: >-`."""
    found, lines = {}, RULES.read_text().splitlines()
    for place, line in enumerate(lines):
        if line.strip().startswith("- alert: "):
            expr = lines[place + 1].strip().removeprefix("expr: ")
            if expr == ">-":
                below = (each for each in lines[place + 2 :])
                parts = []
                for each in below:
                    if re.match(r" {8}\w+:", each):
                        break
                    parts.append(each.strip())
                expr = " ".join(parts)
            found[line.split(": ")[1]] = expr
    return found


def dashboard_queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [each["expr"] for each in dashboard["annotations"]["list"]]
    return [query.replace("$__rate_interval", "1m") for query in queries]


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_finds_nothing_wrong_with_what_ships(tmp_path: Path) -> None:
    assert f"SUCCESS: {len(alerts())} rules found" in promtool("check", "rules", RULES)
    _configured(tmp_path, 8080)
    assert "SUCCESS" in promtool("check", "config", tmp_path / "prometheus.yml")


def test_every_rule_says_what_happened_how_bad_it_is_and_what_to_do() -> None:
    blocks = RULES.read_text().split("- alert: ")[1:]
    assert len(blocks) == len(alerts())
    for block in blocks:
        assert re.search(r"severity: (page|ticket)\b", block), block
        assert re.search(r"summary: \S", block), block
        assert len(block.split("do:", 1)[1]) > 60, block


PLANTED: Final[Mapping[str, Mapping[str, str]]] = {
    "SatmeterContinuousAuditDiffers": {"satmeter_continuous_audit_differences": "2x300"},
    "SatmeterEntriesUnexplained": {"satmeter_entries_explained_ratio": "0.999x300", "satmeter_oldest_unexplained_seconds": "9x300"},
    "SatmeterBooksDiffer": {"satmeter_audit_differences": "1x300"},
    "SatmeterPaymentNotCredited": {"satmeter_topups_uncredited_oldest_seconds": "14000+60x300"},
    "SatmeterReviewWaiting": {"satmeter_topups_to_review": "2x300"},
    "SatmeterTopupChecksOverdue": {"satmeter_topups_check_overdue_seconds": "0+60x300"},
    "SatmeterWebhooksWait": {"satmeter_inbox_oldest_seconds": "0x300", "satmeter_inbox_waiting": "1001x300"},
    "SatmeterDebtsLarge": {"satmeter_debts_nusd": "90e9x300", "satmeter_liabilities_nusd": "1000e9x300"},
    "SatmeterPricesDiffer": {
        'satmeter_told_cost_nusd_total{model="openai/gpt-4o"}': "0+2e9x300",
        'satmeter_catalogue_cost_nusd_total{model="openai/gpt-4o"}': "0+1e9x300",
    },
    "SatmeterAutoTopupsRefused": {
        'satmeter_autotopup_attempts{outcome="rejected"}': "9x300", 'satmeter_autotopup_attempts{outcome="settled"}': "3x300",
    },
    "SatmeterAutoTopupsUnknown": {'satmeter_autotopup_attempts{outcome="unknown"}': "1x300"},
    "SatmeterDown": {'up{job="satmeter",instance="a"}': "0x300"},
    "SatmeterDatabaseAway": {'satmeter_database_up{instance="a"}': "0x300"},
    "SatmeterBackendAway": {'satmeter_breaker_open{backend="BTCPay",process="jobs"}': "1x300"},
    "SatmeterJobNotDone": {
        'satmeter_job_success_timestamp_seconds{task="check top-ups"}': "0x300", 'satmeter_job_interval_seconds{task="check top-ups"}': "2x300",
    },
    "SatmeterJobFails": {
        'satmeter_job_failure_timestamp_seconds{task="expire holds"}': "60+60x300",
        'satmeter_job_success_timestamp_seconds{task="expire holds"}': "10x300",
    },
    "SatmeterHoldsNotExpired": {"satmeter_holds_expired": "3x300"},
    "SatmeterNoticesWait": {"satmeter_notices_overdue_seconds": "1000x300"},
    "SatmeterErrors": {
        'satmeter_requests_total{status="500",route="/x"}': "0+5x300", 'satmeter_requests_total{status="200",route="/x"}': "0+95x300",
    },
    "SatmeterVerdictsSlow": {
        'satmeter_request_seconds_bucket{route="/v1/meter/authorize",le="0.1"}': "0+1x300",
        'satmeter_request_seconds_bucket{route="/v1/meter/authorize",le="1.0"}': "0+90x300",
        'satmeter_request_seconds_bucket{route="/v1/meter/authorize",le="+Inf"}': "0+90x300",
    },
    "SatmeterConnectionsRefused": {'satmeter_connections_ended_total{reason="refused_address"}': "0+7x300"},
    "SatmeterAuditOld": {"satmeter_audit_timestamp_seconds": "-200000x300"},
}  # fmt: skip
"""What each rule rings for: its series, minute by minute."""

HEALTHY: Final = {
    "satmeter_continuous_audit_differences": "0x300", "satmeter_entries_explained_ratio": "1x300",
    "satmeter_oldest_unexplained_seconds": "0x300",
    "satmeter_audit_differences": "0x300", "satmeter_audit_timestamp_seconds": "0+60x300", 'up{job="satmeter",instance="a"}': "1x300",
    "satmeter_topups_uncredited_oldest_seconds": "3000x300", "satmeter_topups_to_review": "0x300",
    "satmeter_topups_check_overdue_seconds": "1x300", "satmeter_inbox_oldest_seconds": "60x300", "satmeter_inbox_waiting": "9x300",
    "satmeter_debts_nusd": "5e9x300", "satmeter_liabilities_nusd": "1000e9x300", 'satmeter_database_up{instance="a"}': "1x300",
    'satmeter_told_cost_nusd_total{model="m"}': "0+1.1e9x300", 'satmeter_catalogue_cost_nusd_total{model="m"}': "0+1e9x300",
    'satmeter_autotopup_attempts{outcome="rejected"}': "4x300", 'satmeter_autotopup_attempts{outcome="unknown"}': "0x300",
    'satmeter_breaker_open{backend="BTCPay",process="jobs"}': "0x300", "satmeter_holds_expired": "0x300",
    "satmeter_notices_overdue_seconds": "20x300",
    'satmeter_job_success_timestamp_seconds{task="check top-ups"}': "0+60x300", 'satmeter_job_interval_seconds{task="check top-ups"}': "2x300",
    'satmeter_job_failure_timestamp_seconds{task="check top-ups"}': "0x300",
    'satmeter_job_success_timestamp_seconds{task="catch up"}': "0x300", 'satmeter_job_interval_seconds{task="catch up"}': "0x300",
    'satmeter_requests_total{status="500",route="/x"}': "1x300", 'satmeter_requests_total{status="200",route="/x"}': "0+95x300",
    'satmeter_request_seconds_bucket{route="/v1/meter/authorize",le="0.1"}': "0+90x300",
    'satmeter_request_seconds_bucket{route="/v1/meter/authorize",le="+Inf"}': "0+90x300",
    'satmeter_connections_ended_total{reason="idle"}': "0+7x300",
}  # fmt: skip


def test_each_rule_rings_for_its_fault_and_none_for_a_healthy_service(tmp_path: Path) -> None:
    assert PLANTED.keys() == alerts().keys(), "a rule without a fault that rings it"
    cases = [_case(PLANTED[name], {name: True}) for name in PLANTED]
    cases.append(_case(HEALTHY, dict.fromkeys(PLANTED, False)))
    told = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "cases.yml").write_text(json.dumps(told))  # JSON is YAML
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "cases.yml")


def _case(series: Mapping[str, str], rings: Mapping[str, bool]) -> dict[str, Any]:
    """After 280 minutes; whether an alert rings is asked of ALERTS, so that its words need not be told again."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": _repeated(values)} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)', "eval_time": "280m",
                "exp_samples": [{"labels": "{}", "value": 1 if is_ringing else 0}],
            }
            for name, is_ringing in rings.items()
        ],
    }  # fmt: skip


def _repeated(values: str) -> str:
    """promtool 2.42 writes a value over and over as `a+0xN`."""
    return values if "+" in values[1:] and "e+" not in values else values.replace("x", "+0x")


# --- in the flesh -------------------------------------------------------------------------------------


def _configured(folder: Path, target_port: int) -> None:
    """What ships, for a server of ours: another target, another file for the token, and no waiting."""
    shutil.copy(RULES, folder)
    (folder / "token").write_text(TOKEN)
    text = (SHIPPED / "prometheus.yml").read_text()
    for shipped, ours in (
        ("127.0.0.1:8080", f"127.0.0.1:{target_port}"),
        ("/etc/prometheus/satmeter-metrics-token", str(folder / "token")),
        ("scrape_interval: 15s", "scrape_interval: 1s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
    ):
        assert shipped in text
        text = text.replace(shipped, ours)
    (folder / "prometheus.yml").write_text(text)


class Prometheus:
    """One that runs, asked over its HTTP API."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **params: str) -> Any:
        try:
            answer = httpx.get(f"{self.url}{path}", params=params, timeout=15, trust_env=False)
        except httpx.TransportError:
            return None
        return answer.json()["data"] if answer.status_code == 200 and path.startswith("/api") else answer.status_code

    def values(self, query: str) -> list[str]:
        """The values of a query now. Raises what Prometheus says is wrong with it."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=15, trust_env=False).json()
        assert answer["status"] == "success", (query, answer)
        data = answer["data"]
        return [data["result"][1]] if data["resultType"] == "scalar" else [each["value"][1] for each in data["result"]]

    def firing(self) -> set[str]:
        found = self.get("/api/v1/alerts")
        return {each["labels"]["alertname"] for each in found["alerts"] if each["state"] == "firing"}


@contextmanager
def prometheus(folder: Path, target_port: int) -> Iterator[Prometheus]:
    _configured(folder, target_port)
    [port] = free_ports(1)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    try:
        found = Prometheus(port)
        eventually(lambda: found.get("/-/ready") == 200, 60)
        yield found
    finally:
        process.terminate()
        process.wait(30)


def _some_traffic(program: Program) -> None:
    """A priced call whose cost is told too, a verdict, a refusal."""
    demo = program.answer("demo")
    headers = {"Authorization": f"Bearer {demo['service_token']}"}
    with httpx.Client(base_url=demo["base_url"], headers=headers, timeout=30, trust_env=False) as client:
        for number in range(3):
            body = {"request_id": f"r{number}", "api_key": demo["api_key"], "model": "gpt-4o-mini", "cost_usd": "0.002"}
            usage = {"usage": {"input_tokens": 9000, "output_tokens": 1000}}
            assert client.post("/v1/meter/charge", json=body | usage).status_code == 200
            asked = {"request_id": f"a{number}", "api_key": demo["api_key"], "max_cost_usd": "0.01"}
            assert client.post("/v1/meter/authorize", json=asked).status_code == 200
        assert client.get("/nowhere").status_code == 404


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus: apt-get install prometheus")
def test_a_real_prometheus_gives_every_query_and_rule_a_value_and_rings_when_something_is_wrong(tmp_path: Path) -> None:
    with installation(METRICS_TOKEN=TOKEN, WORKERS="2") as program:
        program.run()
        _some_traffic(program)
        assert program.command("audit").returncode == 0
        with prometheus(tmp_path, program.http_port) as asked:
            eventually(lambda: asked.values('up{job="satmeter"} == 1'), 60)
            eventually(lambda: asked.values("count_over_time(satmeter_told_cost_nusd_total[1m]) > 3"), 60)
            eventually(lambda: asked.values("satmeter_entries_explained_ratio"), 60)
            eventually(lambda: asked.values("count(count by (process) (process_cpu_seconds_total))") == ["3"], 30)

            for query in dashboard_queries():
                if "ALERTS" not in query:  # there are none as long as all is well
                    assert asked.values(query), f"nothing for {query}"
            for name, expr in alerts().items():
                assert asked.values(_COMPARED.sub(r" \1 bool ", expr)), f"nothing for {name}: {expr}"
            rules = [rule for group in asked.get("/api/v1/rules")["groups"] for rule in group["rules"]]
            eventually(lambda: _are_well(asked), 30)
            assert {rule["name"] for rule in rules} == alerts().keys()
            assert asked.firing() == set()

            _plant(program)
            eventually(lambda: {"SatmeterBooksDiffer"} <= asked.firing(), 60)
            eventually(lambda: {"SatmeterReviewWaiting", "SatmeterPaymentNotCredited"} <= _ringing(asked), 60)
            assert asked.values(next(query for query in dashboard_queries() if "ALERTS" in query))


def _are_well(asked: Prometheus) -> bool:
    rules = [rule for group in asked.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    return all(rule["health"] == "ok" and not rule.get("lastError") for rule in rules)


def _ringing(asked: Prometheus) -> set[str]:
    """Also those that have to last for a while, longer than a test does."""
    return {each["labels"]["alertname"] for each in asked.get("/api/v1/alerts")["alerts"]}


def _plant(program: Program) -> None:
    """Faults in the database itself: a balance that its entries do not explain, a review, and a payment seen five hours ago."""
    program.sql("UPDATE account SET posted_nusd = posted_nusd + 1")
    program.sql(
        "UPDATE topup SET review = 'a person should look', credited_nusd = 0, paid_coin_units = 1, next_check_at = NULL"
    )
    program.sql("UPDATE payment SET received_at = now() - interval '5 hours', worth_nusd = 0")
    assert program.command("audit").returncode == 1
