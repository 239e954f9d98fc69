"""The Serve app of serve_apps/ and its file hold: Serve's own schema reads it, and its args are a service that fits."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import yaml
from eagleray.core.config import load
from eagleray.flows.serve import ServeConfig, to_serving
from eagleray.vision.bundle import load_bundle

from tests.conftest import ROOT

FILE = ROOT / "serve_apps" / "serve.yaml"
# In a process of its own: unit tests load no Ray, and Serve reads its environment when it is imported
READ = """
import sys, yaml
from ray.serve.schema import ServeDeploySchema
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
schema = ServeDeploySchema.model_validate(yaml.safe_load(open(sys.argv[1])))
(application,) = schema.applications
from serve_apps.classify import app
application.args["model"] = sys.argv[2]
made = build(app, application.args)
deployment = made._bound_deployment
options = deployment._deployment_config
print(application.name, deployment.name, options.max_ongoing_requests, options.max_surge_percent,
      options.autoscaling_config.max_replicas, deployment.ray_actor_options["num_cpus"],
      deployment.init_args[0]["models"][0]["digest"])
# A service that has grown to 5 replicas is deployed as it is, and as an update
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID
from types import SimpleNamespace
from eagleray.core.config import load
from eagleray.flows.deployment import build as service
from eagleray.flows.serve import ServeConfig, to_serving
for generation in ("", "abc"):
    config = to_serving(load(ServeConfig, overrides=application.args))
    options = service(config, generation=generation)._bound_deployment._deployment_config
    info = SimpleNamespace(deployment_config=options, target_capacity=None, target_capacity_direction=None)
    print(DeploymentAutoscalingState(DeploymentID("models", "eagleray")).register(info, 5))
"""


def test_its_args_fit_together() -> None:
    (application,) = yaml.safe_load(FILE.read_text(encoding="utf-8"))["applications"]
    config = to_serving(load(ServeConfig, overrides=application["args"]))
    assert config.access.auth == "keys"
    assert config.models[0].name == "lite0"


def test_serve_reads_the_file_and_builds_the_app(tiny_model: Path) -> None:
    digest = load_bundle(tiny_model).model_digest
    done = subprocess.run(
        [sys.executable, "-c", READ, str(FILE), f"lite0={tiny_model}"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "PATH": "/usr/bin:/bin", "RAY_SERVE_LOG_TO_STDERR": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["eagleray", "models", "256", "25", "8", "2.0", digest, "2", "5"]


def test_the_builder_says_its_type_where_serve_looks_for_it() -> None:
    """Under ``from __future__ import annotations`` it would be a string, and Serve would hand over a bare dict."""
    sys.path.insert(0, str(ROOT))
    try:
        source = (ROOT / "serve_apps" / "classify.py").read_text(encoding="utf-8")
    finally:
        sys.path.remove(str(ROOT))
    assert "from __future__" not in source
    assert inspect.isclass(ServeConfig)
