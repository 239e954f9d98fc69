"""Each check of doctor, on machines that are not this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from eagleray.core.errors import CapabilityError
from eagleray.flows import doctor, hardware
from eagleray.flows.hardware import FAIL, OK, WARN, Check

CPUINFO = "model name\t: A CPU\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n"


def test_every_check_that_is_not_ok_has_a_fix() -> None:
    for check in doctor.run():
        assert check.status in (OK, WARN, FAIL)
        assert check.seen
        assert (check.status == OK) == (not check.fix), check


def test_verdict_follows_the_failures() -> None:
    ok, warn, fail = Check("a", OK, "x"), Check("b", WARN, "x", "y"), Check("c", FAIL, "x", "y")
    assert doctor.exit_code([ok, warn]) == 0
    assert doctor.exit_code([ok, fail]) == 5
    assert doctor.to_json([ok, fail])["is_fit"] is False
    assert "do: y" in doctor.to_text([ok, fail])
    assert doctor.to_text([ok, warn, fail]).endswith("1 ok, 1 to know, 1 to mend")


def test_doctor_imports_nothing_heavy_and_answers_in_json() -> None:
    root = Path(__file__).resolve().parents[2] / "platform"
    code = (
        "import sys\nfrom eagleray.flows import doctor\nimport json\n"
        "print(json.dumps(doctor.to_json(doctor.run())))\n"
        "print([name for name in ('ray', 'torch', 'torchvision', 'timm', 'onnxruntime') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    report, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert {"name", "status", "seen", "fix"} == set(json.loads(report)["checks"][0])


@pytest.mark.parametrize(
    ("found", "status"),
    [((3, 10, 9), FAIL), ((3, 11, 7), WARN), ((3, 11, 13), OK), ((3, 12, 1), WARN), ((3, 14, 0), OK)],
)
def test_python(found: tuple[int, ...], status: str) -> None:
    assert doctor.python_version(found).status == status


def test_torch_build_is_named() -> None:
    assert "CPU build" in doctor.torch_build("2.13.0+cpu", None).seen
    assert "CUDA 13.0" in doctor.torch_build("2.13.0+cu130", "13.0").seen
    assert doctor.torch_build(None, None).status == FAIL


def test_a_cuda_torchvision_beside_cpu_torch_is_guarded_and_said() -> None:
    check = doctor.torchvision_build("2.13.0+cpu", None, "0.28.0+cu130")
    assert check.status == OK
    assert "guard" in check.seen


def test_a_torchvision_of_another_torch_fails_with_the_right_one() -> None:
    check = doctor.torchvision_build("2.13.0+cpu", None, "0.27.0")
    assert check.status == FAIL
    assert "torchvision==0.28.*" in check.fix


def test_packages_with_known_holes_are_named() -> None:
    safe = {"pillow": "12.3.0", "onnx": "1.23.2", "torch": "2.13.0", "ray": "2.60.0"}
    assert doctor.package_floors(safe.get).status == OK
    assert (
        doctor.package_floors({**safe, "onnx": None}.get).status == OK
    )  # an extra that is not installed opens nothing
    old = doctor.package_floors({**safe, "pillow": "12.2.9", "onnx": "1.22.0"}.get)
    assert old.status == FAIL
    assert "pillow 12.2.9" in old.seen
    assert old.fix.endswith("pillow onnx")


@pytest.mark.parametrize(("found", "status"), [("2.60.0", OK), ("2.60.3", OK), ("2.61.0", FAIL), (None, FAIL)])
def test_ray_is_the_release_that_was_tried(found: str | None, status: str) -> None:
    assert doctor.ray_version(found).status == status


@pytest.mark.parametrize(("mode", "status"), [(0o600, OK), (0o400, OK), (0o644, FAIL), (0o660, FAIL)])
def test_a_token_that_others_can_read_fails(tmp_path: Path, mode: int, status: str) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("s3cret")
    token.chmod(mode)
    for env in ({}, {"RAY_AUTH_TOKEN_PATH": str(token)}):
        check = doctor.ray_token(env, tmp_path)
        assert check.status == status
        assert "s3cret" not in check.seen + check.fix


def test_ray_without_a_token_fails_only_where_one_was_named(tmp_path: Path) -> None:
    assert doctor.ray_token({}, tmp_path).status == OK
    assert doctor.ray_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, tmp_path).status == FAIL
    assert doctor.ray_token({"RAY_AUTH_TOKEN": "s3cret"}, tmp_path).status == OK
    assert "s3cret" not in doctor.ray_token({"RAY_AUTH_TOKEN": "s3cret"}, tmp_path).seen


def test_ray_with_its_tokens_off_fails(tmp_path: Path) -> None:
    assert doctor.ray_token({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "x"}, tmp_path).status == FAIL


@pytest.mark.parametrize("name", doctor.UNSAFE_WHEN_SET)
def test_unsafe_settings_fail_when_on(name: str) -> None:
    assert doctor.unsafe_settings({name: "1"}).status == FAIL
    assert doctor.unsafe_settings({name: "true"}).fix == f"unset {name}"
    assert doctor.unsafe_settings({name: "0"}).status == OK


def test_haproxy_needs_a_private_folder(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    on = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    assert doctor.haproxy_socket({**on, doctor.HAPROXY_SOCKET: str(private / "admin.sock")}).status == OK
    assert doctor.haproxy_socket({**on, doctor.HAPROXY_SOCKET: "/nowhere/admin.sock"}).status == FAIL
    assert doctor.haproxy_socket({doctor.HAPROXY_SOCKET: "/nowhere/admin.sock"}).status == OK


def test_an_admin_socket_that_all_can_write_fails_also_when_the_mode_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("/open/admin.sock")
    found = {path: 0o666, path.parent: 0o755, Path("/"): 0o755}
    monkeypatch.setattr(Path, "exists", lambda self: self in found)
    monkeypatch.setattr(Path, "is_dir", lambda self: self in found and self != path)
    monkeypatch.setattr(Path, "stat", lambda self: os.stat_result((found[self],) + (0,) * 9))
    assert doctor.haproxy_socket({doctor.HAPROXY_SOCKET: str(path)}).status == FAIL


def test_cpu_features_are_read_from_cpuinfo() -> None:
    check = hardware.cpu_features(CPUINFO)
    assert (check.status, check.seen) == (OK, "A CPU: AVX2, AVX-512, VNNI, AMX")
    assert hardware.cpu_features("flags : fpu sse").status == WARN
    assert hardware.cpu_features("Features : fp asimd").status == OK
    assert hardware.cpu_features("").status == WARN


def test_a_containers_quota_below_its_cores_is_said() -> None:
    assert hardware.cores(8, "200000 100000\n").status == WARN
    assert hardware.cores(2, "200000 100000\n").status == OK
    assert hardware.cores(2, "max 100000\n").status == OK
    assert hardware.cores(2, "").status == OK


def test_memory_is_what_the_container_allows() -> None:
    assert hardware.memory("1073741824\n").status == WARN
    assert "of 1.0 GiB" in hardware.memory("1073741824\n").seen
    assert hardware.memory("max\n").seen == hardware.memory("").seen


def test_gpus() -> None:
    assert hardware.gpus(None, is_torch_cpu_only=True).status == OK
    assert hardware.gpus("", is_torch_cpu_only=False).status == WARN
    assert hardware.gpus("NVIDIA H200, 143771 MiB, 580\n", is_torch_cpu_only=False).status == OK
    assert "CPU build" in hardware.gpus("NVIDIA H200\n", is_torch_cpu_only=True).seen


def test_temp_space_that_cannot_be_written_fails(tmp_path: Path) -> None:
    assert hardware.temp_space(tmp_path / "none").status == FAIL
    assert hardware.temp_space(tmp_path).seen.startswith(str(tmp_path))


@pytest.mark.parametrize(("soft", "hard", "status"), [(512, 4096, FAIL), (1024, 4096, WARN), (4096, 4096, OK)])
def test_open_files(soft: int, hard: int, status: str) -> None:
    check = hardware.open_files(soft, hard)
    assert check.status == status
    assert check.fix in ("", "ulimit -n 4096")


def test_a_ray_port_on_every_interface_is_said() -> None:
    head = "  sl  local_address rem_address   st\n"
    listening = "   0: {}:{:04X} 00000000:0000 {} 00000000:00000000 00:00000000\n"
    assert hardware.open_ports(head + listening.format("00000000", 8265, "0A")).status == WARN
    assert hardware.open_ports(head + listening.format("0" * 32, 10001, "0A")).status == WARN
    assert hardware.open_ports(head + listening.format("0100007F", 8265, "0A")).status == OK
    assert hardware.open_ports(head + listening.format("00000000", 8265, "01")).status == OK
    assert hardware.open_ports(head + listening.format("00000000", 80, "0A")).status == OK


def test_shared_memory_that_is_missing_is_said(tmp_path: Path) -> None:
    assert hardware.shared_memory(tmp_path / "none").status == WARN
    assert hardware.shared_memory(tmp_path).seen.startswith(str(tmp_path))


def test_versions_are_compared_as_numbers() -> None:
    assert doctor.numbers("2.13.0+cu130") == (2, 13, 0)
    assert doctor.numbers("1.9.0rc1") == (1, 9, 0)
    assert doctor.numbers("12.3") < doctor.numbers("12.10")


def test_a_stale_resize_kernel_is_a_failed_check_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise CapabilityError("built from another resample.c", fix="pip install -e .")

    monkeypatch.setattr(doctor, "kernel", refuse)
    check = doctor.resize_kernel()
    assert (check.status, check.fix) == (doctor.FAIL, "pip install -e .")
    monkeypatch.setattr(doctor, "kernel", lambda: "pillow")
    assert doctor.resize_kernel().status == doctor.WARN
