"""Costs of compiled programs: by hand, in the text of the compilers and of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from grpo_jax.run.plan.costs import Costs, Speed, costs_of
from grpo_jax.run.plan.hlo import Array, parse
from grpo_jax.run.plan.scratch import scratch_bytes

# Two layers in a loop: a product [8, 4] x [4, 4], gathered over two devices; and an update.
LOOP = """HloModule jit_f, is_scheduled=true

%fused (p0: f32[8,4], p1: f32[2,4,4], p2: s32[]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = f32[2,4,4]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,4,4]{2,1,0} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,4,4}
  %matrix = f32[4,4]{1,0} bitcast(%slice)
  ROOT %dot = f32[8,4]{1,0} dot(%p0, %matrix), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (carry: (s32[], f32[8,4], f32[2,4,4])) -> (s32[], f32[8,4], f32[2,4,4]) {
  %carry = (s32[], f32[8,4]{1,0}, /*index=2*/f32[2,4,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%carry), index=1
  %w = f32[2,4,4]{2,1,0} get-tuple-element(%carry), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8,4]{1,0} fusion(%x, %w, %i), kind=kOutput, calls=%fused, backend_config={
"a":"b (c"}
  %z = f32[8,4]{1,0} all-reduce(%y), replica_groups=[4,2]<=[8], to_apply=%sum
  ROOT %out = (s32[], f32[8,4]{1,0}, f32[2,4,4]{2,1,0}) tuple(%next, %z, %w)
}

%condition (carry.1: (s32[], f32[8,4], f32[2,4,4])) -> pred[] {
  %carry.1 = (s32[], f32[8,4]{1,0}, f32[2,4,4]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[8,4], b: f32[2,4,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[2,4,4]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[8,4]{1,0}, f32[2,4,4]{2,1,0}) tuple(%start, %a, %b)
  %loop = (s32[], f32[8,4]{1,0}, f32[2,4,4]{2,1,0}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_program_counted_by_hand():
    costs = costs_of(parse(LOOP), speed=Speed(flops=2 * 8 * 4 * 4, bandwidth=1.0))
    assert costs.flops == 3 * 2 * 8 * 4 * 4
    add = 12  # the counter and 1 are read, the counter is written
    fusion = 4 * (8 * 4 + 4 * 4 + 1 + 8 * 4)  # x, one of two slices of w, the counter, and y
    reduce = 4 * 2 * 8 * 4
    assert costs.bytes == 3 * (add + fusion + reduce)
    assert costs.seconds == 3 * (add + fusion + reduce)  # more than 1 second of FLOPs each
    assert costs.unknown_loops == 0
    reduced = costs.collectives['all-reduce']
    assert (reduced.count, reduced.bytes) == (3, 3 * 2 * (4 * 8 * 4) / 2)  # in groups of two
    assert costs.traffic == reduced.bytes


@pytest.mark.parametrize(
    ('groups', 'size'),
    [('{{0,1,2,3},{4,5,6,7}}', 4), ('[2,4]<=[8]', 4), ("mesh['a'=2,'b'=4,'c'=1] {'a','b'}", 8)],
)
def test_groups_of_a_collective_in_all_notations(groups, size):
    text = LOOP.replace('[4,2]<=[8]', groups)
    assert costs_of(parse(text)).traffic == 3 * 2 * (4 * 8 * 4) * (size - 1) / size


def test_what_products_on_cpus_copy_by_hand():
    """Up to three parts of both factors, at most 256 long: [8, 4] x [4, 4]; and a batch."""
    assert scratch_bytes(parse(LOOP)) == 3 * (8 + 4) * 4 * 4
    batch = """HloModule m
ENTRY %main (a: f32[5,16,1000], b: f32[5,1000,8]) -> f32[5,16,8] {
  %a = f32[5,16,1000] parameter(0)
  %b = f32[5,1000,8] parameter(1)
  ROOT %c = f32[5,16,8] dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}
}
"""  # noqa: E501
    assert scratch_bytes(parse(batch)) == 3 * (16 + 8) * 256 * 4


def test_a_loop_whose_trips_depend_on_data_has_those_given():
    text = LOOP.replace('%limit = s32[] constant(3)', '%limit = s32[] negate(%i.1)')
    costs = costs_of(parse(text), trips=7)
    assert (costs.flops, costs.unknown_loops) == (7 * 2 * 8 * 4 * 4, 1)


def test_trips_that_the_compiler_wrote_down():
    text = LOOP.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert costs_of(parse(text)).flops == 5 * 2 * 8 * 4 * 4


@pytest.mark.parametrize(
    ('window', 'lhs', 'rhs', 'out', 'labels', 'flops'),
    [
        # A matrix product [16, 32] x [32, 8].
        ('', '16,32', '32,8', '16,8', 'bf_io->bf', 2 * 16 * 32 * 8),
        # Six products [16, 32] x [32, 8]: position 0 of each window of 6 is in the padding.
        ('size=6 stride=5 pad=5_5 lhs_dilate=6', '6,16,32', '6,32,8', '6,16,8', '0bf_0io->0bf',
         6 * 2 * 16 * 32 * 8),
        # A convolution of 4 positions with a kernel of 3 and a padding of 1: 3 * 4 - 2 pairs.
        ('size=3 pad=1_1', '1,4,2', '3,2,5', '1,4,5', 'b0f_0io->b0f', 2 * 10 * 2 * 5),
    ],
)  # fmt: skip
def test_products_written_as_convolutions(window, lhs, rhs, out, labels, flops):
    text = f"""HloModule m
ENTRY %main (a: bf16[{lhs}], b: bf16[{rhs}]) -> bf16[{out}] {{
  %a = bf16[{lhs}] parameter(0)
  %b = bf16[{rhs}] parameter(1)
  ROOT %c = bf16[{out}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}
}}
"""
    assert costs_of(parse(text)).flops == flops


def test_what_stays_on_the_chip_is_no_memory_traffic():
    text = """HloModule m
ENTRY %main (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  %near = f32[256]{0:T(128)S(1)} negate(%a)
  ROOT %out = f32[256]{0} negate(%near)
}
"""
    assert costs_of(parse(text)).bytes == 2 * 4 * 256


def test_slices_and_updates_in_fusions_inside_of_fusions():
    """One of four rows of a matrix is read, doubled, and written over another row in place."""
    text = """HloModule m
%slice (p0: f32[4,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[4,8] parameter(0)
  %p1 = s32[] parameter(1)
  %c0 = s32[] constant(0)
  ROOT %ds = f32[1,8] dynamic-slice(%p0, %p1, %c0), dynamic_slice_sizes={1,8}
}
%update (q0: f32[4,8], q1: f32[4,8], q2: s32[]) -> f32[4,8] {
  %q0 = f32[4,8] parameter(0)
  %q1 = f32[4,8] parameter(1)
  %q2 = s32[] parameter(2)
  %c1 = s32[] constant(0)
  %row = f32[1,8] fusion(%q1, %q2), kind=kLoop, calls=%slice
  %twice = f32[1,8] add(%row, %row)
  %flat = f32[4,8] bitcast(%q0)
  ROOT %dus = f32[4,8] dynamic-update-slice(%flat, %twice, %q2, %c1)
}
ENTRY %main (a: f32[4,8], b: f32[4,8], i: s32[]) -> f32[4,8] {
  %a = f32[4,8] parameter(0)
  %b = f32[4,8] parameter(1)
  %i = s32[] parameter(2)
  ROOT %out = f32[4,8] fusion(%a, %b, %i), kind=kLoop, calls=%update
}
"""
    row, index = 4 * 8, 4
    # The index is both an argument of slices and read itself.
    assert costs_of(parse(text)).bytes == row + row + index


def test_a_copy_in_place_of_a_stack_reads_only_what_is_sliced():
    """A fusion gives a stack of matrices another tiling; one of its four matrices is then read."""
    text = """HloModule m
%tiling (p0: s8[4,8]) -> s8[4,8] {
  %p0 = s8[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %copy = s8[4,8]{1,0:T(32,128)} copy(%p0)
}
%layer (q0: s8[4,8], q1: s32[]) -> s8[1,8] {
  %q0 = s8[4,8] parameter(0)
  %q1 = s32[] parameter(1)
  %c0 = s32[] constant(0)
  %tiled = s8[4,8] fusion(%q0), kind=kLoop, calls=%tiling, output_to_operand_aliasing={{}: (0, {})}
  ROOT %ds = s8[1,8] dynamic-slice(%tiled, %q1, %c0), dynamic_slice_sizes={1,8}
}
ENTRY %main (a: s8[4,8], i: s32[]) -> s8[1,8] {
  %a = s8[4,8] parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = s8[1,8] fusion(%a, %i), kind=kLoop, calls=%layer
}
"""
    assert costs_of(parse(text)).bytes == 8 + 4 + 8
    apart = text.replace(', output_to_operand_aliasing={{}: (0, {})}', '')
    assert costs_of(parse(apart)).bytes == 32 + 4 + 8  # the whole stack is copied


def test_arrays():
    assert Array('pred', (3, 5)).bytes == 15
    assert Array('bf16', (2, 3)).bytes == 12
    assert Array('u4', (3,)).bytes == 2
    assert Array('f32', ()).bytes == 4
    assert Array('token', ()).bytes == 0
    with pytest.raises(ValueError, match='no entry computation'):
        parse('HloModule m')


def test_costs_add_up():
    assert (Costs(1.0, 2.0, 3.0) + Costs(4.0, 5.0, 6.0)) * 2 == Costs(10.0, 14.0, 18.0)


def test_a_compiled_program_with_nested_loops():
    """Scans of 5 and of 3 trips, of products [64, 64] x [64, 64]; the branch with two of them."""
    size = 64

    def program(x, choose):
        def inner(c, _):
            return c @ c, None

        def outer(c, _):
            return jax.lax.scan(inner, c, length=5)[0] @ x, None

        x = jax.lax.scan(outer, x, length=3)[0]
        return jax.lax.cond(choose, lambda x: (x @ x) @ x, lambda x: x @ x, x)

    arguments = jax.ShapeDtypeStruct((size, size), jnp.float32), jax.ShapeDtypeStruct((), bool)
    text = tiny.jit(program).lower(*arguments).compile().as_text()
    assert costs_of(parse(text)).flops == (3 * (5 + 1) + 2) * 2 * size**3


def test_kernels_of_experts():
    """128 experts [2048, 768], 4096 rows: 2 * 4096 * 2048 * 768 FLOPs each."""
    lines = [
        '%n = s32[128]{0} parameter(0)',
        '%x = bf16[4096,2048]{1,0} parameter(1)',
        '%w = bf16[128,2048,768]{2,1,0} parameter(2)',
        '%g = bf16[4096,768]{1,0} parameter(3)',
        '%ragged-dot-none.1 = bf16[4096,768]{1,0} custom-call(%n, %x, %w)',
        'ROOT %jit_tgmm___.2 = bf16[128,2048,768]{2,1,0} custom-call(%n, %x, %g)',
    ]
    text = '\n  '.join(['HloModule experts\n\nENTRY %main () -> bf16[128,2048,768] {', *lines])
    assert costs_of(parse(f'{text}\n}}\n')).flops == 2 * 2 * 4096 * 2048 * 768
