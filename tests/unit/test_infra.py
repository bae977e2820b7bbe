"""Infrastructure files as far as they can be checked without a container engine."""

import importlib
import json
import re
import urllib.request
from pathlib import Path

import pytest
import typer.main
import yaml

from flows.cli import app
from flows.server import same_origin
from roadfuse_core.cluster import open_cluster
from roadfuse_core.metrics import HistoryEntry, append_history, write_metrics
from roadfuse_core.settings import ClusterSpec

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"


def yamls():
    return sorted(INFRA.rglob("*.y*ml"))


@pytest.mark.parametrize("path", yamls(), ids=lambda p: p.name)
def test_every_yaml_parses(path):
    assert all(list(yaml.safe_load_all(path.read_text())))


def compose():
    return yaml.safe_load((INFRA / "compose/compose.yaml").read_text())


def test_compose_refers_to_what_there_is():
    spec = compose()
    assert set(spec) <= {"name", "services", "volumes", "x-roadfuse"}
    known = {"image", "build", "restart", "environment", "volumes", "command", "ports", "depends_on", "healthcheck", "profiles",
             "deploy"}  # fmt: skip
    for name, service in spec["services"].items():
        assert set(service) <= known, name
        for other in service.get("depends_on", []):
            assert other in spec["services"], name
        if "build" in service:
            assert (INFRA / "compose" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("../monitoring"):
                assert (INFRA / "compose" / source).exists(), source
            elif not source.startswith("."):
                assert source in spec["volumes"], source


def test_nothing_listens_beyond_loopback_and_no_password_is_written_down():
    for name, service in compose()["services"].items():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
    for path in [p for p in INFRA.rglob("*") if p.is_file()]:
        for line in path.read_text().splitlines():
            found = re.search(r"(?i)(password|secret[_-]?key|token)\w*[\"']?\s*[:=]\s*[\"']?([^\s\"'{$}?]+)", line)
            assert not found, (path.name, line)
    example = (INFRA / "compose/.env.example").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", (INFRA / "compose/compose.yaml").read_text()))
    assert asked == set(re.findall(r"^(\w+)=$", example, re.MULTILINE))


def test_every_server_answers_its_own_page_alone():
    """In compose, on Kubernetes and as the page for operators says."""
    settings = compose()["services"]["prefect"]["environment"]
    values = yaml.safe_load((INFRA / "k8s/prefect-server-values.yaml").read_text())["server"]["env"]
    exported = re.findall(r"^export (PREFECT_SERVER\w+)=(\S+)", (ROOT / "docs/operate.md").read_text(), re.MULTILINE)
    wanted = same_origin(4200)
    for given in (settings, {v["name"]: v["value"] for v in values}, dict(exported)):
        assert {name: given.get(name) for name in wanted} == wanted


def test_commands_in_images_exist():
    commands = typer.main.get_command(app).commands
    for path in INFRA.glob("docker/*"):
        text = path.read_text()
        for name in re.findall(r'"roadfuse", "([a-z]+)"', text):
            assert name in commands
        for copied in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE):
            for source in copied.split():
                assert (ROOT / source).exists(), source
        assert re.search(r"^USER roadfuse$", text, re.MULTILINE), "not as root"
        assert "tini" in text


def test_deployments_are_flows_with_those_parameters():
    spec = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    names = set()
    for deployment in spec["deployments"]:
        module, name = deployment["entrypoint"].rsplit(".", 1)
        flow = getattr(importlib.import_module(module), name)
        assert set(deployment["parameters"]) <= set(flow.parameters.properties)
        assert set(flow.parameters.required) <= set(deployment["parameters"])
        for schedule in deployment.get("schedules", []):
            assert schedule["active"] is False, "nothing runs before somebody wants it"
        names.add(flow.name)
    assert names == {"refresh", "watch", "backfill", "train", "evaluate"}


def test_kubernetes_manifests_have_what_every_object_needs():
    for path in ("dask-cluster.yaml", "dask-cuda-workers.yaml", "namespace.yaml"):
        for thing in yaml.safe_load_all((INFRA / "k8s" / path).read_text()):
            assert {"apiVersion", "kind", "metadata"} <= set(thing)
            assert re.fullmatch(r"[a-z0-9-]+", thing["metadata"]["name"])
            for container in _containers(thing):
                assert container["resources"]["limits"]["memory"], "bounded"
                mounted = {m["name"] for m in container.get("volumeMounts", [])}
                assert mounted <= {v["name"] for v in _volumes(thing)}
    workers = yaml.safe_load((INFRA / "k8s/dask-cuda-workers.yaml").read_text())
    cluster = yaml.safe_load((INFRA / "k8s/dask-cluster.yaml").read_text())
    assert workers["spec"]["cluster"] == cluster["metadata"]["name"]
    assert _containers(workers)[0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def _containers(thing):
    if isinstance(thing, dict):
        return [c for k, v in thing.items() for c in (v if k == "containers" else _containers(v))]
    return [c for v in thing for c in _containers(v)] if isinstance(thing, list) else []


def _volumes(thing):
    if isinstance(thing, dict):
        return [c for k, v in thing.items() for c in (v if k == "volumes" else _volumes(v))]
    return [c for v in thing for c in _volumes(v)] if isinstance(thing, list) else []


def test_every_metric_that_is_asked_for_exists(small_city):
    """Against a running scheduler and worker, and what a refresh writes."""
    pytest.importorskip("prometheus_client")
    small_city.workspace_path.mkdir()
    entry = HistoryEntry(published=True, record={"windows": 3}, seconds=1.0, scores={"map": {"test": {"g_iou": 0.5}}})
    append_history(small_city, entry)
    text = write_metrics(small_city, entry, [{"rows": 10, "rejected": {"outside": 4}}]).read_text()
    assert f'roadfuse_rows_rejected_share{{city="{small_city.name}"}} 0.4' in text
    with open_cluster(ClusterSpec(workers=1)) as client:
        client.submit(len, [1]).result()
        pages = [client.dashboard_link.replace("/status", "/metrics")]
        worker = next(iter(client.scheduler_info(n_workers=-1)["workers"].values()))
        pages.append(f"http://127.0.0.1:{worker['services']['dashboard']}/metrics")
        for page in pages:
            with urllib.request.urlopen(page) as answer:
                text += answer.read().decode()
    exposed = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    panels = json.loads((INFRA / "monitoring/grafana/roadfuse.json").read_text())["panels"]
    rules = yaml.safe_load((INFRA / "monitoring/alerts.yml").read_text())["groups"][0]["rules"]
    asked = " ".join([t["expr"] for p in panels for t in p["targets"]] + [r["expr"] for r in rules])
    assert set(re.findall(r"(?:dask|roadfuse)_\w+", asked)) <= exposed


def test_every_alert_has_its_paragraph():
    page = (ROOT / "docs/operate.md").read_text()
    for rule in yaml.safe_load((INFRA / "monitoring/alerts.yml").read_text())["groups"][0]["rules"]:
        assert f"`{rule['alert']}`" in page
