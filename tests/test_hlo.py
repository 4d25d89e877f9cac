"""Reading the text of compiled programs."""

import jax
import jax.numpy as jnp

from psp_jax.dry_run.hlo import Collective, Cost, read_cost

LOOPS = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %v = f32[8]{0} get-tuple-element(%p), index=1
  %fused = f32[8]{0} fusion(%v), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"7"}
  %reduced = f32[8]{0} all-reduce(%fused), channel_id=1, to_apply=%add
  ROOT %out = (s32[], f32[8]{0}) tuple(%v, %reduced)
}

%inner_condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]{0:T(128)}, /*index=2*/s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%q), index=0
  %limit = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

%outer_body (r: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (s32[], f32[8]{0}) parameter(0)
  %first = s32[] constant(1)
  %copied = s32[]{:T(128)} copy(%first)
  %w = f32[8]{0} get-tuple-element(%r), index=1
  %start = (s32[], f32[8]{0}) tuple(%copied, %w)
  ROOT %while.1 = (s32[], f32[8]{0}) while(%start), condition=%inner_condition, body=%inner_body
}

%outer_condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  ROOT %wrapped = pred[] fusion(%s), kind=kLoop, calls=%add
}

ENTRY %main (a: f32[8], b: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = s32[] parameter(1)
  %t = (s32[], f32[8]{0}) tuple(%b, %a)
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"}}
  %c = f32[8]{0} get-tuple-element(%while.2), index=1
  ROOT %d = f32[8]{0} negate(%c), backend_config={"window_config":{"estimated_cycles":"100"}}
}
"""


def test_cycles_and_collectives_count_once_a_round_of_their_loops():
    # 5 rounds of a loop that counts from 1 to 4
    assert read_cost(LOOPS) == Cost(
        collectives={'all-reduce': Collective(15, 15 * 32)},
        cycles=5 * 3 * 7 + 100,
        unknown_loops=0,
    )


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    unknown = read_cost(
        LOOPS.replace('%copied = s32[]{:T(128)} copy(%first)', '%copied = s32[] negate(%first)')
    )
    assert unknown.unknown_loops == 1
    assert unknown.collectives['all-reduce'].calls == 5


def test_collectives_count_the_larger_of_what_is_sent_and_received():
    text = """\
HloModule m

%wrapped (p: bf16[16,2]) -> bf16[4,2] {
  %p = bf16[16,2]{1,0} parameter(0)
  ROOT %rs = bf16[4,2]{1,0} reduce-scatter(%p), channel_id=3, dimensions={0}
}

ENTRY %main (a: f32[2,3]) -> f32[8,3] {
  %a = f32[2,3]{1,0} parameter(0)
  %ags = (f32[2,3]{1,0}, f32[8,3]{1,0:T(8,128)}) all-gather-start(%a), dimensions={0}
  %ag = f32[8,3]{1,0} all-gather-done(%ags)
  %cps = (f32[2,3]{1,0}, f32[2,3]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=2
  %cp = f32[2,3]{1,0} collective-permute-done(%cps)
  %b = s64[3]{0} parameter(1)
  %ar = (f32[2,3]{1,0}, s64[3]{0}) all-reduce-start(%a, %b), channel_id=1
  %ard = (f32[2,3]{1,0}, s64[3]{0}) all-reduce-done(%ar)
  %h = bf16[16,2]{1,0} parameter(2)
  %as = ((bf16[16,2]{1,0}), bf16[4,2]{1,0}) async-start(%h), calls=%wrapped
  %ad = bf16[4,2]{1,0} async-done(%as)
  ROOT %r = f32[8,3]{1,0} copy(%ag)
}
"""
    collectives = {
        'all-gather': Collective(1, 8 * 3 * 4),
        'all-reduce': Collective(1, 2 * 3 * 4 + 3 * 8),
        'collective-permute': Collective(1, 2 * 3 * 4 + 8),
        'reduce-scatter': Collective(1, 16 * 2 * 2),
    }
    assert read_cost(text) == Cost(collectives, cycles=None, unknown_loops=0)


def test_the_length_of_a_loop_in_a_real_program_is_known():
    def fn(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) @ c, None), x, None, length=11)[0]

    text = jax.jit(fn).lower(jax.ShapeDtypeStruct((4, 4), jnp.float32)).compile().as_text()
    assert 'while(' in text and read_cost(text).unknown_loops == 0
