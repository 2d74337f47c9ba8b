"""The text of TPU programs has forms of its own. These are cut from what libtpu compiles."""

import pytest

from ppo_jax.planner.hlo.cost import hlo_cost
from ppo_jax.planner.hlo.instructions import group_size
from ppo_jax.planner.hlo.text import parse_module

HEAD = "HloModule jit_f, is_scheduled=true, num_partitions=4\n\n"
BF16 = 2  # bytes


def program(*computations):
    """Each computation as its header and its lines."""
    bodies = (header + " {\n  " + "\n  ".join(lines) + "\n}\n" for header, *lines in computations)
    return HEAD + "\n".join(bodies)


def entry(*lines):
    return ("ENTRY %main_spmd (p: f32[]) -> f32[]", *lines)


def convolution(left, right, out, form):
    return program(
        entry(
            f"%a = bf16[{left}]{{1,0:T(8,128)(2,1)}} parameter(0)",
            f"%b = bf16[{right}]{{1,0:T(8,128)(2,1)}} parameter(1)",
            f"ROOT %c = bf16[{out}]{{1,0:T(8,128)(2,1)}} convolution(%a, %b), {form}",
        )
    )


CONVOLUTIONS = {
    # A plain product, [8, 256] x [256, 512].
    ("8,256", "256,512", "8,512", "dim_labels=bf_io->bf"): 2 * 8 * 512 * 256,
    # The batch is summed over, as a window of 8: the gradient of a kernel.
    (
        "8,511,512",
        "8,511,768",
        "512,768,1",
        "window={size=8}, dim_labels=0fb_0io->bf0",
    ): 2 * 512 * 768 * 8 * 511,
    # Two heads as a spatial axis that only padding lengthens: [8, 511, 512] x [512, 2 x 64].
    (
        "8,511,512,1",
        "2,64,512,1",
        "8,511,2,64",
        "window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
    ): 2 * 8 * 511 * 2 * 64 * 512,
    # Attention scores: the batch of 8 and 2 key heads by dilation, 2 queries a key by padding.
    (
        "8,511,2,64,1",
        "8,511,2,2,64",
        "8,2,511,511,2",
        "window={size=8x2x2 stride=7x1x1 pad=0_0x0_0x1_1 lhs_dilate=8x2x1 rhs_reversal=0x0x1}, "
        "dim_labels=0b1f2_0o12i->01bf2",
    ): 2 * 8 * 2 * 2 * 511 * 511 * 64,
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_products_as_convolutions(form):
    assert hlo_cost(convolution(*form)).flops == CONVOLUTIONS[form]


def test_only_main_memory_counts():
    """S(1) is the memory near the core. The copy into it reads main memory, and no more."""
    text = program(
        entry(
            "%a = f32[64,128]{1,0:T(8,128)} parameter(0)",
            "%b = f32[64,128]{1,0:T(8,128)S(1)} parameter(1)",
            "%start = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) "
            "copy-start(%a)",
            "%done = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%start)",
            "%sum = f32[64,128]{1,0:T(8,128)S(1)} add(%done, %b)",
            "%part = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
            "slice-start(%a), slice={[0:16], [0:128]}",
            "ROOT %out = f32[64,128]{1,0:T(8,128)} copy(%sum)",
        )
    )
    assert hlo_cost(text).bytes_accessed == 4 * (64 * 128 + 16 * 128 + 64 * 128)


def test_fusions_read_and_write_a_slice_of_a_stack_in_place():
    """The cache of layer i: its slice is read, one position is new, the stack stays where it is."""
    stack = "bf16[6,8,512,128]{3,2,1,0:T(8,128)(2,1)}"
    new = "bf16[1,8,1,128]{3,2,1,0:T(8,128)(2,1)}"
    text = program(
        (
            f"%fused.1 (p0: {stack[:16]}, p1: s32[]) -> bf16[8,512,128]",
            f"%p0 = {stack} parameter(0)",
            "%p1 = s32[] parameter(1)",
            "%zero = s32[] constant(0)",
            "%slice = bf16[1,8,512,128]{3,2,1,0:T(8,128)(2,1)} "
            "dynamic-slice(%p0, %p1, %zero, %zero, /*index=4*/%zero), "
            "dynamic_slice_sizes={1,8,512,128}",
            "ROOT %flat = bf16[8,512,128]{2,1,0:T(8,128)(2,1)} bitcast(%slice)",
        ),
        (
            f"%fused.2 (q0: {stack[:16]}, q1: bf16[1,8,1,128], q2: s32[]) -> bf16[6,8,512,128]",
            f"%q0 = {stack} parameter(0)",
            f"%q1 = {new} parameter(1)",
            "%q2 = s32[] parameter(2)",
            "%zero.1 = s32[] constant(0)",
            f"ROOT %dus = {stack} dynamic-update-slice(%q0, %q1, %q2, %zero.1, %q2, %zero.1)",
        ),
        entry(
            f"%a = {stack} parameter(0)",
            f"%b = {new} parameter(1)",
            "%i = s32[]{:T(128)S(6)} parameter(2)",
            "%layer = bf16[8,512,128]{2,1,0:T(8,128)(2,1)} fusion(%a, %i), kind=kLoop, "
            "calls=%fused.1",
            f"ROOT %out = {stack} fusion(%a, %b, %i), kind=kLoop, calls=%fused.2",
        ),
    )
    layer, position = 8 * 512 * 128, 8 * 128
    assert hlo_cost(text).bytes_accessed == BF16 * (2 * layer + 2 * position)


def kernel(phase, block, *operands):
    """A call of the Pallas kernel: what it is made of stands on lines of its own."""
    name = f"splash_mha_{phase}_segmented_residuals"
    return (
        f"%{name}.1 = (f32[{block},128]{{1,0:T(8,128)}}, bf16[2,9,1024,64]{{3,2,1,0:T(8,128)}}) "
        f'custom-call({", ".join(operands)}), custom_call_target="tpu_custom_call", '
        "frontend_attributes={kernel_metadata={",
        f'"xprof_metadata":"{{\\"block_q{"" if phase == "fwd" else "_" + phase}\\": {block}}}"',
        f'}}}}, metadata={{op_name="jit(f)/shard_map/{name}/pallas_call" stack_frame_id=7}}',
    )


@pytest.mark.parametrize(("phase", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
@pytest.mark.parametrize(
    ("block", "grid", "blocks"),
    [(512, "2,2", 3), (1024, "1,1", 1), (128, "8,8", 36), (128, "8,3", 21), (128, "2,8", 15)],
)
def test_a_kernel_of_attention_counts_the_blocks_that_it_computes(
    phase, products, block, grid, blocks
):
    """Rows of 1,024 in blocks of 512: three of four lie on or below the diagonal. Within a window
    the grid has fewer blocks of keys for each of queries, or of queries for each of keys."""
    pairs = blocks * block**2
    first, *more = kernel(phase, block, "%m", "%q", "%k", "%k")
    text = program(
        entry(
            f"%m = s8[1,{grid}]{{2,1,0:T(4,128)(4,1)}} parameter(0)",
            "%q = bf16[2,9,1024,64]{3,2,1,0:T(8,128)(2,1)} parameter(1)",
            "%k = bf16[2,3,1024,64]{3,2,1,0:T(8,128)(2,1)} parameter(2)",
            "\n".join([first, *more]),
            "%other = bf16[2,9,1024,64]{3,2,1,0:T(8,128)(2,1)} custom-call(%q), "
            'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/gather/pallas_call"}',
            "ROOT %out = bf16[2,9,1024,64]{3,2,1,0:T(8,128)(2,1)} add(%other, %other)",
        )
    )
    cost = hlo_cost(text)
    assert cost.flops == 2 * products * 2 * 9 * 64 * pairs
    assert cost.attention_kernels == 1
    names = parse_module(text).entry.instructions
    assert {"other", "out"} <= set(names)  # what follows the kernel's lines is read on


GROUPED = 'metadata={op_name="jit(f)/while/body/blocks_16/ragged_dot_general/ragged-dot-none"}'


@pytest.mark.parametrize(
    ("counts", "share"), [(None, 1), (7, 1), ({"": 7, "decoding": 3}, 1), ({"blocks": 0.25}, 0.25)]
)
def test_a_product_by_group_counts_a_matrix_a_row(counts, share):
    """By the TPU's kernel, of which others only say where the groups are; and where it is none."""
    text = program(
        entry(
            "%n = s32[16] parameter(0)",
            "%x = bf16[4096,256] parameter(1)",
            "%w = bf16[16,256,384] parameter(2)",
            '%where = s32[17] custom-call(%n), custom_call_target="tpu_custom_call", '
            'metadata={op_name="ragged-dot-metadata"}',
            "%y = bf16[4096,384] custom-call(%where, /*index=1*/%x, %w), "
            f'custom_call_target="tpu_custom_call", {GROUPED}',
            "ROOT %out = bf16[4096,384] add(%y, %y)",
        )
    )
    product = 2 * 4096 * 256 * 384
    assert hlo_cost(text, max_trip_counts=counts).flops == share * product
    for left, right, out in (
        ("4096,256", "16,256,384", "4096,384"),
        ("4096,256", "4096,384", "16,256,384"),
    ):
        plain = program(
            entry(
                f"%x = bf16[{left}] parameter(0)",
                f"%w = bf16[{right}] parameter(1)",
                "%n = s32[16] parameter(2)",
                f"ROOT %out = bf16[{out}] ragged-dot(%x, %w, %n), lhs_ragged_dims={{0}}, {GROUPED}",
            )
        )
        assert hlo_cost(plain, max_trip_counts=counts).flops == share * product


@pytest.mark.parametrize(("target", "products"), [("fmhaSoftmax", 2), ("fmhaSoftmaxBackward", 5)])
def test_cudnn_counts_half_of_all_pairs(target, products):
    text = program(
        entry(
            "%q = bf16[2,1024,9,64]{3,2,1,0} parameter(0)",
            "%k = bf16[2,1024,3,64]{3,2,1,0} parameter(1)",
            "ROOT %out = (bf16[2,9,1024,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), "
            f'custom_call_target="__cudnn${target}"',
        )
    )
    cost = hlo_cost(text)
    assert cost.flops == 2 * products * 2 * 9 * 64 * 1024**2 / 2
    assert cost.attention_kernels == 1


GROUPS = "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, use_global_device_ids=true"


def gathered(name, operand):
    return (
        f"%{name} = bf16[512,64] all-gather(%{operand}), channel_id=3, {GROUPS}, dimensions={{0}}"
    )


def test_a_gather_in_stages_counts_once():
    """It starts in one fusion, goes on beside a product in another, and ends in a third."""
    carried = "(bf16[256,64], bf16[512,64], u32[]{:S(2)})"
    beside = "(bf16[8,64], bf16[256,64], bf16[512,64], u32[]{:S(2)})"
    text = program(
        (
            "%fused_computation.1 (p0: bf16[256,64]) -> (bf16[256,64], bf16[512,64], u32[])",
            "%p0 = bf16[256,64] parameter(0)",
            gathered("g0", "p0"),
            f'ROOT %s = {carried} custom-call(%g0), custom_call_target="AsyncCollectiveStart"',
        ),
        (
            "%async_collective_fusion.2 (q0: bf16[256,64], q1: bf16[512,64], q2: u32[], "
            "q3: bf16[8,512], q4: bf16[512,64]) -> (bf16[8,64], bf16[256,64], bf16[512,64], u32[])",
            "%q0 = bf16[256,64] parameter(0)",
            "%q1 = bf16[512,64] parameter(1)",
            "%q2 = u32[]{:S(2)} parameter(2)",
            "%q3 = bf16[8,512] parameter(3)",
            "%q4 = bf16[512,64] parameter(4)",
            gathered("g1", "q0"),
            "%c = bf16[8,64] convolution(%q3, %q4), dim_labels=bf_io->bf",
            f"ROOT %t = {beside} tuple(%c, %q0, %g1, %q2)",
        ),
        (
            "%fused_computation.3 (r0: bf16[256,64], r1: bf16[512,64], r2: u32[]) -> bf16[512,64]",
            "%r0 = bf16[256,64] parameter(0)",
            "%r1 = bf16[512,64] parameter(1)",
            "%r2 = u32[]{:S(2)} parameter(2)",
            gathered("g2", "r0"),
            "ROOT %d = bf16[512,64] custom-call(%r0, %r1, %g2, %r2), "
            'custom_call_target="AsyncCollectiveDone"',
        ),
        entry(
            "%a = bf16[256,64] parameter(0)",
            "%x = bf16[8,512] parameter(1)",
            "%w = bf16[512,64] parameter(2)",
            f"%start = {carried} fusion(%a), kind=kCustom, calls=%fused_computation.1",
            "%e0 = bf16[256,64] get-tuple-element(%start), index=0",
            "%e1 = bf16[512,64] get-tuple-element(%start), index=1",
            "%e2 = u32[]{:S(2)} get-tuple-element(%start), index=2",
            f"%go = {beside} fusion(%e0, %e1, %e2, %x, %w), kind=kOutput, "
            "calls=%async_collective_fusion.2",
            "%h0 = bf16[256,64] get-tuple-element(%go), index=1",
            "%h1 = bf16[512,64] get-tuple-element(%go), index=2",
            "%h2 = u32[]{:S(2)} get-tuple-element(%go), index=3",
            "ROOT %done = bf16[512,64] fusion(%h0, %h1, %h2), kind=kCustom, "
            "calls=%fused_computation.3",
        ),
    )
    cost = hlo_cost(text)
    piece, product = 256 * 64, 8 * 512 + 512 * 64 + 8 * 64
    assert cost.collectives == {"all-gather": (1, BF16 * piece)}
    assert cost.flops == 2 * 8 * 64 * 512
    assert cost.bytes_accessed == BF16 * (piece + 2 * piece + product)


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter():
    text = program(
        (
            "%all-reduce-scatter.1 (p0: f32[512,64]) -> f32[256,64]",
            "%p0 = f32[512,64] parameter(0)",
            "%r = f32[512,64] all-reduce(%p0), channel_id=1, replica_groups={{0,2},{1,3}}, "
            "use_global_device_ids=true, to_apply=%add",
            "%i = s32[] constant(0)",
            "ROOT %s = f32[256,64] dynamic-slice(%r, %i, %i), dynamic_slice_sizes={256,64}",
        ),
        entry(
            "%a = f32[512,64] parameter(0)",
            "ROOT %out = f32[256,64] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1",
        ),
    )
    cost = hlo_cost(text)
    assert cost.collectives == {"reduce-scatter": (1, 4 * 512 * 64 / 2)}
    assert cost.bytes_accessed == 4 * (512 * 64 + 256 * 64)


@pytest.mark.parametrize(
    ("opcode", "result", "sent"),
    [
        ("all-reduce-start", "f32[64]", 2 * 3 / 4 * 256),
        ("all-gather-start", "(f32[64], f32[256])", 3 * 256),
        ("all-to-all", "(f32[64], f32[64])", 3 / 4 * 256),
    ],
)
def test_asynchronous_and_tuple_forms_count_where_they_start(opcode, result, sent):
    done = opcode.replace("-start", "-done")
    end = [f"ROOT %d = f32[256] {done}(%s)"] if done != opcode else []
    text = program(
        entry(
            "%a = f32[64] parameter(0)",
            f"%s = {result} {opcode}(%a), channel_id=1, replica_groups=[1,4]<=[4]",
            *(end or ["ROOT %d = f32[64] get-tuple-element(%s), index=0"]),
        )
    )
    kind = opcode.removesuffix("-start")
    assert hlo_cost(text).collectives == {kind: (1, sent)}


@pytest.mark.parametrize(
    ("opcode", "called"), [("async", "calls=%wrapped"), ("call", "to_apply=%wrapped")]
)
def test_what_runs_asynchronously_counts_as_what_it_is(opcode, called):
    """The second form is of collectives that a core of their own runs."""
    text = program(
        (
            "%wrapped (p0: f32[64]) -> f32[16]",
            "%p0 = f32[64] parameter(0)",
            "ROOT %r = f32[16] reduce-scatter(%p0), replica_groups={}, dimensions={0}",
        ),
        entry(
            "%a = f32[64] parameter(0)",
            f"%s = ((f32[64]), f32[16], s32[]) {opcode}-start(%a), {called}",
            f"ROOT %d = f32[16] {opcode}-done(%s)",
        ),
    )
    cost = hlo_cost(text)
    assert cost.collectives == {"reduce-scatter": (1, 3 / 4 * 256)}
    assert cost.bytes_accessed == 256 + 64


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups={{0,1,2,3}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true", 2),
        ("replica_groups={}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", 2),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", 2),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", 2),
        ("source_target_pairs={{0,0},{1,1}}", 1),
    ],
)
def test_how_many_chips_a_collective_joins(groups, size):
    line = f"ROOT %r = f32[4] all-reduce(%a), channel_id=1, {groups}, to_apply=%add"
    module = parse_module(program(entry("%a = f32[4] parameter(0)", line)))
    assert group_size(module.entry.root, num_devices=8) == size


def test_groups_in_an_unknown_form_are_refused():
    line = 'ROOT %r = f32[4] all-reduce(%a), replica_groups=<new>, metadata={op_name="jit(f)/sum"}'
    module = parse_module(program(entry("%a = f32[4] parameter(0)", line)))
    with pytest.raises(ValueError, match=r"jit\(f\)/sum: groups in an unknown form"):
        group_size(module.entry.root, num_devices=8)


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo_cost("module @jit_f {}")
