"""The benchmark: its suite and arithmetic, its report, and a run of the harness."""

import json
import sys

import pytest

torch = pytest.importorskip("torch")

from binconv.__main__ import main  # noqa: E402
from binconv.torch.bench import measure, report, timing  # noqa: E402
from binconv.torch.bench.contenders import PackedConv2d  # noqa: E402
from binconv.torch.bench.cutlass import _and_popcounts  # noqa: E402
from binconv.torch.bench.suite import Layer, layers  # noqa: E402

CPU = torch.device("cpu")
TINY = Layer("bireal18", "tiny", 2, 32, 24, kernel=3, stride=2, pad=1, in_size=5)


@pytest.fixture
def tiny(monkeypatch):
    """A suite of one small layer, and a small tensor to pack."""
    monkeypatch.setattr("binconv.torch.bench.layers", lambda rows, batches: [TINY])
    monkeypatch.setattr(measure, "PACK_SIZES", ((8, 4),))


# -------------------------------------------------------------------------------------------- suite


@pytest.mark.parametrize(
    ("name", "batch", "microseconds"),
    [
        ("r18_56_64", 128, 12.4),
        ("cb_56_128", 128, 24.8),
        ("r18_7_512", 128, 1.9),
        ("cb_28_512", 128, 30.4),
        ("seed_4096_128_k5", 8, 212),
    ],
)
def test_floor_of_fp16_output(name, batch, microseconds):
    (layer,) = layers(f"/{name}$", [128])
    assert layer.batch == batch
    assert layer.floor_us(1, 16) == pytest.approx(microseconds, rel=0.02)


def test_counts_of_a_layer():
    assert TINY.out_size == 3
    assert TINY.operations == 2 * (2 * 3 * 3 * 24) * (3 * 3 * 32)
    assert TINY.bytes_moved(1, 16) == 2 * 5 * 5 * 32 // 8 + 24 * 9 * 32 // 8 + 2 * 3 * 3 * 24 * 2
    assert (TINY.shape().out_height, TINY.shape().out_width) == (3, 3)


def test_rows_are_found_by_group_or_name_at_every_batch_or_their_own():
    everything = layers("", [1, 8, 128])
    assert len(everything) == 3 * 33 + 5
    assert {layer.group for layer in layers("^(bireal18|quicknet)/", [1])} == {
        "bireal18",
        "quicknet",
    }
    assert [layer.batch for layer in layers("r18_7_512", [1, 8])] == [1, 8]
    assert [layer.batch for layer in layers("seed_1024_64_k3", [1, 128])] == [8]
    assert layers("no such row", [1]) == []


# ------------------------------------------------------------------------------------------- timing


def test_every_buffer_set_gets_its_turn_and_outputs_are_kept_apart():
    seen, addresses = [], []

    def call(i):
        out = torch.empty(1 << 20)
        seen.append(i)
        addresses.append(out.data_ptr())
        return out

    timing._run(call, sets=3, launches=7)
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    for i in range(5):
        assert len(set(addresses[i : i + 3])) == 3


def test_time_is_the_median_between_the_quartiles():
    result = timing.time_call(lambda i: None, 2, CPU, 9)
    assert 0 < result.first_quartile_us <= result.us <= result.third_quartile_us


def test_host_time_counts_calls():
    calls = []
    timing.host_us(lambda: calls.append(1), CPU, 3)
    assert len(calls) == 4 * 200


# ----------------------------------------------------------------------------------------- baseline


def test_and_popcounts_follow_from_the_exact_sums():
    conv = PackedConv2d(TINY, CPU, "int32", pad_value=-1)
    conv(0)
    found = _and_popcounts(TINY, conv.input[0], conv.weight, conv.out[0])
    places = 2 ** torch.arange(8)

    def bits(packed):
        values = (packed.unsqueeze(-1).int() & places) != 0
        return values.flatten(-2)[..., : TINY.c_in].permute(0, 3, 1, 2).double()

    expected = torch.nn.functional.conv2d(bits(conv.input[0]), bits(conv.weight), None, 2, 1)
    assert torch.equal(found.double(), expected.permute(0, 2, 3, 1))


# ------------------------------------------------------------------------------------------- report


def cell(name="x", group="bireal18", batch=128, kernel=3, us=10.0, speedup=5.0, of_floor=0.8):
    times = {"us": us, "first_quartile_us": us, "third_quartile_us": us}
    rates = {**times, "tops": 1.0, "tb_s": 1.0, "floor_us": 6.0}
    form = {**rates, "of_floor": of_floor, "speedup": speedup}
    return {
        "group": group,
        "name": name,
        "batch": batch,
        "kernel": kernel,
        "kernel_name": "cuda_x",
        "torch_fp16": times,
        "fp16": form,
        "bits": form,
        "layer": form,
        "fp16_nchw": {**form, "us": 1.4 * us},
        "cutlass_and": {**times, "tile": 0, "speedup_over": 1.0},
    }


def results_of(*cells, host=14.0, of_copy=0.9):
    pack = {"sizes": (1, 8, 4, 4), "dtype": "float16", "layout": "nhwc", "tb_s": 1.0}
    return {
        "about": {"device": "H200"},
        "layers": list(cells),
        "pack_bits": [{**pack, "of_copy": of_copy}],
        "host_call": {"us": host},
    }


def bar_of(results, text):
    (found,) = [bar for bar in report.bars(results) if bar.text.startswith(text)]
    return found


def test_bars_are_met_or_missed_by_the_worst_layer():
    results = results_of(cell("good", of_floor=0.9), cell("bad", of_floor=0.7))
    bar = bar_of(results, "fp16 out, least of floor + 2 us, bireal18")
    assert (bar.reached, bar.worst, bar.met) == (0.7, "bad, batch 128", False)
    assert bar_of(results_of(cell()), bar.text).met


def test_means_are_geometric():
    results = results_of(cell(speedup=2.0), cell(speedup=8.0), cell(group="quicknet", speedup=99.0))
    assert bar_of(results, "fp16 out, bireal18").reached == pytest.approx(4.0)
    assert "| bireal18 | 128 | 4.00x | 4.00x | 4.00x |" in report.summary(results)


def test_a_bar_from_above_is_missed_above_it():
    assert bar_of(results_of(cell(), host=14.0), "binary_conv2d").met
    assert not bar_of(results_of(cell(), host=15.5), "binary_conv2d").met
    assert bar_of(results_of(cell()), "fp16 out, NCHW").reached == pytest.approx(1.4)


def test_bars_speak_of_what_was_measured_only():
    single = cell(batch=1)
    del single["fp16_nchw"], single["cutlass_and"]
    texts = [bar.text for bar in report.bars(results_of(single))]
    assert [text for text in texts if not text.startswith("batch 1")] == [
        "pack_bits, least of a copy's TB/s",
        "binary_conv2d, host time of a call",
    ]


def test_table_has_a_value_for_each_column():
    bare = cell()
    del bare["layer"], bare["cutlass_and"]
    lines = [*report.heading({}).splitlines()[-2:], report.line(cell()), report.line(bare)]
    assert {line.count("|") for line in lines} == {len(report.COLUMNS) + 1}


# ---------------------------------------------------------------------------------------------- run


def test_run_reports_and_writes_tables(tiny, tmp_path, capsys):
    output = tmp_path / "new" / "tiny.v1"
    assert main(["bench", "--device", "cpu", "--quick", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "\n| tiny | 2 | cpu_" in out
    assert out.rstrip().splitlines()[-1].startswith("| binary_conv2d, host time of a call | <= 15")
    assert (tmp_path / "new" / "tiny.v1.md").read_text() == out
    results = json.loads((tmp_path / "new" / "tiny.v1.json").read_text())
    (found,) = results["layers"]
    assert found["kernel_name"].startswith("cpu_")
    for form in ("fp16", "bits", "layer"):
        speedup = found["torch_fp16"]["us"] / found[form]["us"]
        assert found[form]["speedup"] == pytest.approx(speedup)
    assert {pack["layout"] for pack in results["pack_bits"]} == {"nhwc", "nchw"}
    assert results["about"]["torch"] == torch.__version__


def test_plots_are_pictures(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "tiny"
    options = ["--device", "cpu", "--quick", "--plots", "--output", str(output)]
    assert main(["bench", *options]) == 0
    for name in ("tiny_roofline.png", "tiny_speedups.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_forced_kernel_is_the_one_measured(tiny, capsys):
    assert main(["bench", "--device", "cpu", "--quick", "--kernel", "cpu_portable"]) == 0
    assert "| tiny | 2 | cpu_portable |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "no such row"], "--rows: got 'no such row'"),
        (["--rows", "["], "--rows: got '['"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--kernel", "fastest"], "--kernel: got 'fastest', expected cpu_"),
        (["--plots"], "--plots: got no --output"),
        (["--cutlass", "x.so"], "--cutlass: got --device cpu"),
    ],
)
def test_unusable_options_are_one_clear_message(options, message, capsys):
    assert main(["bench", "--device", "cpu", *options]) == 1
    assert capsys.readouterr().err.startswith(f"binconv bench: {message}")


def test_missing_torch_is_one_clear_message(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("binconv.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("binconv.torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench"]) == 1
    message = "binconv bench: no module named 'torch'; run: pip install \"binconv[torch]\"\n"
    assert capsys.readouterr().err == message


@pytest.mark.gpu
def test_run_on_the_gpu(tiny, capsys):
    assert main(["bench", "--quick"]) == 0
    assert torch.cuda.get_device_name(0) in capsys.readouterr().out


@pytest.mark.gpu
def test_graph_runs_every_buffer_set():
    outs = torch.zeros(5, device="cuda")
    timing.time_call(lambda i: outs[i].add_(1), 5, torch.device("cuda", 0), 3)
    counts = outs.tolist()
    assert counts[0] >= counts[-1] > 4
