"""Collectives of a compiled program's text, with their loops."""

from zofo_jax.plan import hlo

TEXT = """
HloModule jit_step, is_scheduled=true

%cond (p: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = bf16[2,8]{1,0:T(8,128)(2,1)} all-gather(%p1), dimensions={0}
  %inner = (s32[]) while(%t), condition=%cond2, body=%body2, \
backend_config={"known_trip_count":{"n":"3"}}
}

%cond2 (p: (s32[])) -> pred[] {
  ROOT %lt2 = pred[] compare(%i, %n), direction=LT
}

%body2 (p: (s32[])) -> (s32[]) {
  %x = f32[2,3]{1,0} all-reduce(%y), channel_id=1
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %loop = (s32[], f32[4]) while(%t), condition=%cond, body=%body
  %s = (f32[1]{0}, f32[4]{0}) all-gather-start(%b), dimensions={0}
  %d = f32[4]{0} all-gather-done(%s)
  ROOT %r = (f32[], pred[5]) all-reduce(%c, %e), to_apply=%sum
  %fusion = f32[9]{0} fusion(%all-reduce.1), kind=kLoop
}
"""


def test_collectives_are_found_and_counted():
  text = TEXT.replace("\\\n", "")
  assert sorted(hlo.collectives(text)) == [
    ("all-gather", 16, 1),
    ("all-gather", 32, 32),
    ("all-reduce", 9, 1),
    ("all-reduce", 24, 96),
  ]
  assert hlo.total_bytes(text) == {
    "all-gather": 16 + 32 * 32,
    "all-reduce": 9 + 24 * 96,
  }
