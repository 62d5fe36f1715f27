"""Times a TileKernels release on the cases of our benchmark: one JSON line a case, {peer, op, case, us, gbs}.

Method, that of ../../../shared/peer/README.md and of tests/src/support/bench.rs: a 512 MiB buffer is zeroed before every call, so that
inputs start outside L2 and the host runs ahead of the device; an event on either side of the call; the median of 31 calls, of what takes less
than 20 us in three places each, as in bench.rs. Case strings are
those of our benchmark, `key=value` with the keys in alphabetical order; where ../shared/peer/time_peer.py has the case it is the same there.
A case that the release can't run is a line with `error`.

    time_peer.py v1|v2 [--only REGEX] [--list] [--seconds N] [--repeats N]
    time_peer.py v1|v2 --compile-only --shard 3/15      # calls every case of the shard once: 15 processes side by side fill the cache

The release is on PYTHONPATH (../shared/peer/bundle.sh packs it).
"""
import argparse
import json
import re
import statistics
import sys
import time
import zlib

ap = argparse.ArgumentParser()
ap.add_argument('peer', choices=['v1', 'v2'])
ap.add_argument('--only', default='', help='regular expression that "op case" must contain')
ap.add_argument('--list', action='store_true', help='print the cases and end')
ap.add_argument('--repeats', type=int, default=31)
ap.add_argument('--seconds', type=float, default=1e9, help='start no case after this time')
ap.add_argument('--compile-only', action='store_true', help='call each case once and time nothing')
ap.add_argument('--shard', default='0/1', metavar='I/N', help='only every Nth case, from the Ith on')
args = ap.parse_args()
v1 = args.peer == 'v1'
cases = []


def case(op, *params, only=None, **more):
    """Register what the decorated function builds: the call, and the tensors that it reads."""
    params = dict(*params, **more)
    name = ','.join(f'{k}={v}' for k, v in sorted(params.items()))

    def add(build):
        if only in (None, args.peer):
            cases.append((op, name, build))
        return build
    return add


# ---- inputs ------------------------------------------------------------------------------------------------------------------------------
dev = 'cuda'


def dtype(name):
    return {'bf16': torch.bfloat16, 'f32': torch.float32, 'fp32': torch.float32, 'e4m3': torch.float8_e4m3fn}[name]


def randn(*shape, to='bf16'):
    return torch.randn(*shape, device=dev, dtype=torch.float32).to(dtype(to))


def rand(*shape):
    return torch.rand(*shape, device=dev)


def cdiv(a, b):
    return -(-a // b)


def align(a, b):
    return cdiv(a, b) * b


def pair(t, h, fmt, block, layout='R'):
    """Quantised data with constant scales in one of the layouts of spec/quant.md 3."""
    if fmt == 'e4m3':
        data = (randn(t, h, to='f32') * 128).to(dtype('e4m3'))
    else:
        data = torch.randint(-128, 128, (t, h // 2), device=dev, dtype=torch.int8)
    m, k = cdiv(t, block[0]), cdiv(h, block[1])
    if layout == 'CP':
        return data, torch.full((cdiv(k, 4), align(m, 4)), 0x78787878, device=dev, dtype=torch.int32).T[:m]
    if layout == 'TP':
        return data, torch.full((cdiv(m, 4), k), 0x78787878, device=dev, dtype=torch.int32)
    sf = torch.full((m, k), 2.0 ** -7, device=dev)
    return data, sf.to(dtype('e4m3')) if layout == 'R8' else sf


def routed(send, k, e, ep):
    """What rank 0 receives: slots of other ranks are -1, tokens without a slot here are dropped."""
    idx = torch.rand(send * ep, e * ep, device=dev).topk(k, dim=-1, sorted=False)[1]
    idx[idx >= e] = -1
    return idx[(idx >= 0).any(1)].contiguous()


def mapped(send, k, e, ep, alignment):
    """1.0.0's maps: pos_to_expert, pos_to_token, pos_to_token_topk, token_topk_to_pos; and the slots."""
    idx = routed(send, k, e, ep)
    return *tk.moe.get_fused_mapping(idx, e, 0, alignment)[:4], idx


def counts(send, k, e, ep):
    idx = routed(send, k, e, ep)
    return torch.bincount(idx[idx >= 0], minlength=e).tolist()


def num_rows(send, k, e, ep, alignment):
    return sum(align(n, alignment) for n in counts(send, k, e, ep))


def psum(send, k, e, ep):
    """2.1.0's layout at alignment 128: the ends of the experts' rows, and the number of rows."""
    ends, rows = [], 0
    for n in counts(send, k, e, ep):
        ends.append(align(rows, 128) + n)
        rows = ends[-1]
    return torch.tensor(ends, device=dev, dtype=torch.int32), align(rows, 128)


def clamp_args(clamp):
    """The clamp and the counters that go with it, as each release calls them."""
    if clamp is None:
        return {}
    counted = torch.zeros(3 if v1 else 4, device=dev, dtype=torch.int64)
    return {'swiglu_clamp_value' if v1 else 'clamp_value': clamp, 'clamped_count': counted}


ROW = dict(round_sf=True)
PACKED = dict(use_tma_aligned_col_major_sf=True, round_sf=True, use_packed_ue8m0=True)
SF = {'row': ROW, 'packed': PACKED}
T, H = 8064, 7168
SMALL = (1, 16, 128)
MOE = ((9, 8), (32, 8), (4, 64))


# ---- per_token_cast ----------------------------------------------------------------------------------------------------------------------
def per_token_cast(fmt, name, npc, t, h=H, only=None):
    @case('per_token_cast', fmt=fmt, h=h, input=name, npc=npc, sf='packed', t=t, only=only)
    def _():
        if ',' not in name:
            x = randn(t, h, to=name)
            return lambda: tk.quant.per_token_cast(x, fmt, npc, **PACKED), x
        source, block = name.split(',')
        block = tuple(map(int, block.split('x')))
        x = pair(t, h, source, block, 'CP')
        return lambda: tk.quant.per_token_cast(x, fmt, npc, x_block_size=block, **PACKED), x


for name in ('bf16', 'f32'):
    for t in (T, 8001):
        for fmt in ('e4m3', 'e2m1'):
            for npc in (32, 128):
                per_token_cast(fmt, name, npc, t)
            per_token_cast(fmt, name, H, t, only='v1')
    per_token_cast('e4m3', name, 32, 4001, 2048)
    per_token_cast('e4m3', name, 128, 8001, 576)
for source in ('e4m3', 'e2m1'):
    for fmt in ('e4m3', 'e2m1'):
        for npc in (32, 128):
            for block in ('128x128', '32x32'):
                per_token_cast(fmt, f'{source},{block}', npc, 8001)
for t in SMALL:
    per_token_cast('e4m3', 'bf16', 128, t)
    per_token_cast('e4m3', 'f32', 128, t)
    per_token_cast('e2m1', 'bf16', 32, t)
    per_token_cast('e4m3', 'e4m3,128x128', 128, t)


@case('per_token_cast', fmt='e2m1', h=H, input='bf16', npc=16, sf='e4m3', t=T, only='v2')
def _():
    x = randn(T, H)
    return lambda: tk.quant.per_token_cast(x, 'e2m1', 16, use_e4m3_sf=True), x


@case('per_token_cast', fmt='e4m3', h=H, input='bf16', npc=32, sf='packed_row', t=T, only='v2')
def _():
    x = randn(T, H)
    return lambda: tk.quant.per_token_cast(x, 'e4m3', 32, round_sf=True, use_packed_ue8m0=True), x


# ---- per_block_cast ----------------------------------------------------------------------------------------------------------------------
def per_block_cast(fmt, name, t, h=H, block=(128, 128), sf=None, only=None):
    more = {} if sf is None else dict(sf=sf)

    @case('per_block_cast', more, block=f'{block[0]}x{block[1]}', fmt=fmt, h=h, input=name, t=t, only=only)
    def _():
        x = randn(t, h, to=name)
        return lambda: tk.quant.per_block_cast(x, fmt, block, **SF[sf or 'row']), x


for fmt in ('e4m3', 'e2m1'):
    per_block_cast(fmt, 'bf16', T)
    for name in ('bf16', 'f32'):
        for sf in ('row', 'packed'):
            for block in ((128, 128), (32, 32)):
                per_block_cast(fmt, name, 8001, block=block, sf=sf, only='v1')
per_block_cast('e4m3', 'bf16', 4001, 2048, only='v1')
for t in SMALL:
    per_block_cast('e4m3', 'bf16', t, only=None if t == 128 else 'v1')


def per_block_cast_lossless(t, out, h=H, in_sf=None, out_sf=None, only=None):
    more = {} if in_sf is None else dict(in_sf=in_sf, out_sf=out_sf)

    @case('per_block_cast_lossless', more, h=h, input='e2m1,1x32', out=f'e4m3,{out[0]}x{out[1]}', t=t, only=only)
    def _():
        x = tk.quant.per_token_cast(randn(t, h), 'e2m1', 32, **SF[in_sf or 'row'])
        return lambda: tk.quant.per_block_cast_lossless(x, 'e4m3', (1, 32), out, **SF[out_sf or 'row']), x


per_block_cast_lossless(T, (128, 128))
for out in ((1, 128), (32, 32), (128, 128)):
    for in_sf in SF:
        for out_sf in SF:
            per_block_cast_lossless(8001, out, in_sf=in_sf, out_sf=out_sf, only='v1')
            if out != (32, 32) and in_sf == out_sf:
                per_block_cast_lossless(T, out, in_sf=in_sf, out_sf=out_sf)
per_block_cast_lossless(4001, (1, 128), 2048, 'row', 'row', only='v1')
for t in SMALL:
    per_block_cast_lossless(t, (1, 128), in_sf='row', out_sf='row', only=None if t == 128 else 'v1')


# ---- per_channel_cast and its kin --------------------------------------------------------------------------------------------------------
def rounding(round_sf):
    return {} if round_sf else dict(round=False)


def per_channel_cast(npt, t, h=H, round_sf=True, npc=None, packed=False, only=None):
    more = rounding(round_sf) | (dict(sf='packed') if packed else {}) | ({} if npc is None else dict(input=f'e4m3,1x{npc}'))

    @case('per_channel_cast', more, h=h, npt=npt, t=t, only=only)
    def _():
        x, options = randn(t, h), dict(round_sf=round_sf)
        if packed:
            options['use_packed_ue8m0'] = True
        if npc is not None:
            x = tk.quant.per_token_cast(x, 'e4m3', npc)
            options['num_per_channels'] = npc
        return lambda: tk.quant.per_channel_cast(x, 'e4m3', npt, **options), x


per_channel_cast(128, T)
per_channel_cast(128, T, round_sf=False)
per_channel_cast(128, 4096, 2048, round_sf=False)
per_channel_cast(128, 128)
per_channel_cast(32, T, only='v2')
per_channel_cast(128, T, packed=True, only='v2')
per_channel_cast(32, T, packed=True, only='v2')
per_channel_cast(128, T, npc=128, only='v2')
per_channel_cast(128, T, npc=32, only='v2')


def per_channel_cast_fused(name, h=H, moe=None):
    where = dict(t=4096) if moe is None else dict(e=moe[0], ep=moe[1], k=6, send=4001)

    @case('per_channel_cast_fused', where, h=h, input=name, npt=128, round=False, only='v1')
    def _():
        pos_to_token = None if moe is None else mapped(4001, 6, *moe, 128)[1]
        x = randn(4096 if moe is None else pos_to_token.shape[0], h)
        npc = None
        if name != 'bf16':
            x, npc = tk.quant.per_token_cast(x, 'e4m3', 128), 128
        f = tk.quant.per_channel_cast_fused
        return lambda: f(x, 'e4m3', 128, round_sf=False, num_per_channels=npc, pos_to_token=pos_to_token), (x, pos_to_token)


for name in ('bf16', 'e4m3,1x128'):
    per_channel_cast_fused(name)
    for moe in MOE:
        per_channel_cast_fused(name, moe=moe)
per_channel_cast_fused('bf16', 2048)


def per_channel_cast_and_transpose(npt, t, h=H, round_sf=True):
    @case('per_channel_cast_and_transpose', rounding(round_sf), h=h, npt=npt, t=t, only='v1')
    def _():
        x = randn(t, h)
        return lambda: tk.quant.per_channel_cast_and_transpose(x, 'e4m3', npt, round_sf=round_sf), x


def swiglu_forward_and_per_channel_cast_and_transpose(npt, t, h=H, round_sf=True, transpose=True):
    more = rounding(round_sf) | ({} if transpose else dict(transpose=False))

    @case('swiglu_forward_and_per_channel_cast_and_transpose', more, h=h, npt=npt, t=t, only='v1')
    def _():
        x = randn(t, 2 * h)
        f = tk.quant.swiglu_forward_and_per_channel_cast_and_transpose
        return lambda: f(x, 'e4m3', npt, round_sf=round_sf, without_transpose=not transpose), x


for npt in (128, 32):
    for round_sf in (True, False):
        per_channel_cast_and_transpose(npt, T, round_sf=round_sf)
        for transpose in (True, False):
            swiglu_forward_and_per_channel_cast_and_transpose(npt, T, round_sf=round_sf, transpose=transpose)
per_channel_cast_and_transpose(32, 4096, 2048)
per_channel_cast_and_transpose(128, 128)
swiglu_forward_and_per_channel_cast_and_transpose(32, 4096, 2048, transpose=False)
swiglu_forward_and_per_channel_cast_and_transpose(128, 128)


# ---- e5m6 --------------------------------------------------------------------------------------------------------------------------------
def per_token_cast_to_e5m6(name, t, h=H, sf=None):
    @case('per_token_cast_to_e5m6', {} if sf is None else dict(sf=sf), h=h, input=name, t=t, only='v1')
    def _():
        x = randn(t, h, to=name)
        return lambda: tk.quant.per_token_cast(x, 'e5m6', h, **SF[sf or 'row']), x


def cast_back_e5m6(layout, out, t, h=H):
    @case('cast_back_e5m6', h=h, layout=layout, out=out, t=t, only='v1')
    def _():
        x = tk.quant.per_token_cast(randn(t, h), 'e5m6', h, **SF['row' if layout == 'R' else 'packed'])
        return lambda: tk.quant.cast_back(x, out, (1, h), x_special_fmt='e5m6'), x


per_token_cast_to_e5m6('bf16', T)
for sf in SF:
    for name in ('bf16', 'f32'):
        per_token_cast_to_e5m6(name, 8001, sf=sf)
for layout in ('R', 'CP'):
    for out in ('bf16', 'fp32'):
        cast_back_e5m6(layout, out, 8001)
per_token_cast_to_e5m6('bf16', 4001, 2048, 'row')
cast_back_e5m6('R', 'bf16', 4001, 2048)
for t in SMALL:
    per_token_cast_to_e5m6('bf16', t, sf='row')
    cast_back_e5m6('R', 'bf16', t)


# ---- cast_back ---------------------------------------------------------------------------------------------------------------------------
def cast_back(fmt, out, block, t, h=H, layout=None, only=None):
    @case('cast_back', {} if layout is None else dict(layout=layout), fmt=fmt, h=h, out=out, sf=f'{block[0]}x{block[1]}', t=t, only=only)
    def _():
        x = pair(t, h, fmt, block, layout or 'R')
        if block[0] == 1:
            return lambda: tk.quant.per_token_cast_back(x, out, block[1]), x
        return lambda: tk.quant.cast_back(x, out, block), x


for fmt in ('e4m3', 'e2m1'):
    for out in ('bf16', 'fp32'):
        cast_back(fmt, out, (1, 128), T)
    for layout in ('R', 'CP'):
        cast_back(fmt, 'fp32', (1, 128), 8001, layout=layout)
        cast_back(fmt, 'fp32', (1, H), 8001, layout=layout, only='v1')
    cast_back(fmt, 'bf16', (1, 128), 8001, layout='CP')
cast_back('e4m3', 'bf16', (128, 128), T)
cast_back('e2m1', 'fp32', (1, 128), 4001, 2048, 'R')
for out in ('bf16', 'fp32'):
    for block in ((128, 1), (128, 128)):
        cast_back('e4m3', out, block, 8001, layout='R')
cast_back('e4m3', 'bf16', (128, 1), 4001, 2048, 'R')
cast_back('e4m3', 'bf16', (1, 128), 8001, 576, 'R')
cast_back('e4m3', 'bf16', (128, 1), T, layout='TP', only='v2')
cast_back('e2m1', 'bf16', (1, 16), T, layout='R8', only='v2')
cast_back('e4m3', 'bf16', (1, 128), T, layout='R8', only='v2')
for t in SMALL:
    cast_back('e4m3', 'bf16', (1, 128), t, layout='R')
cast_back('e2m1', 'fp32', (1, 128), 128, layout='R')


# ---- SwiGLU ------------------------------------------------------------------------------------------------------------------------------
def swiglu_forward_and_per_token_cast(t, h):
    @case('swiglu_forward_and_per_token_cast', h=h, npc=128, sf='packed', t=t)
    def _():
        x = randn(t, 2 * h)
        return lambda: tk.quant.swiglu_forward_and_per_token_cast(x, 'e4m3', 128, **PACKED), x


def swiglu_forward_of_experts(e, ep, h, k, clamp=None, masked=False):
    more = ({} if clamp is None else dict(clamp=clamp)) | (dict(pos_to_expert=True) if masked else {})

    @case('swiglu_forward_and_per_token_cast', more, e=e, ep=ep, h=h, k=k, npc=128, send=4001, sf='packed', only='v1' if masked else None)
    def _():
        pos_to_expert = mapped(4001, k, e, ep, 16)[0] if v1 else None
        x = randn(pos_to_expert.shape[0] if v1 else num_rows(4001, k, e, ep, 16), 2 * h)
        maps, options = (None, None, pos_to_expert) if masked else (), PACKED | clamp_args(clamp)
        return lambda: tk.quant.swiglu_forward_and_per_token_cast(x, 'e4m3', 128, *maps, **options), x


def swiglu_forward_of_psum(h, npc, clamp=None, weights=False):
    more = ({} if clamp is None else dict(clamp=clamp)) | (dict(weights=True) if weights else {})

    @case('swiglu_forward_and_per_token_cast', more, e=32, ep=8, h=h, k=8, npc=npc, psum=True, send=4001, sf='packed', only='v2')
    def _():
        ends, rows = psum(4001, 8, 32, 8)
        x, w, scale = randn(rows, 2 * h), rand(rows) if weights else None, 2.5 if weights else None
        f, options = tk.quant.swiglu_forward_and_per_token_cast, PACKED | clamp_args(clamp)
        return lambda: f(x, 'e4m3', npc, ends, w, scale, **options), (x, w)


for h in (2048, 3072):
    swiglu_forward_and_per_token_cast(32768, h)
for t in SMALL:
    swiglu_forward_and_per_token_cast(t, 2048)
swiglu_forward_of_experts(9, 8, 1024, 8, masked=True)
swiglu_forward_of_experts(9, 8, 1536, 8, 0.5, masked=True)
swiglu_forward_of_experts(9, 8, 3072, 8)
swiglu_forward_of_experts(32, 8, 1024, 8, 0.5)
swiglu_forward_of_experts(32, 8, 2048, 8, masked=True)
swiglu_forward_of_experts(32, 8, 3584, 8, 0.5, masked=True)
swiglu_forward_of_experts(4, 64, 1280, 8)
swiglu_forward_of_experts(4, 64, 2048, 8, 0.5)
swiglu_forward_of_experts(9, 8, 2048, 2, masked=True)
swiglu_forward_of_psum(2048, 128)
swiglu_forward_of_psum(2048, 32, weights=True)
swiglu_forward_of_psum(3584, 128, 0.5)


@case('swiglu_forward', fmt='bf16', h=2048, input='bf16', t=32768, only='v2')
def _():
    x = randn(32768, 4096)
    return lambda: tk.quant.swiglu_forward(x, 'bf16'), x


@case('swiglu_forward', fmt='fp32', h=2048, input='f32', t=32768, only='v2')
def _():
    x = randn(32768, 4096, to='f32')
    return lambda: tk.quant.swiglu_forward(x, 'fp32'), x


def swiglu_backward_of_experts(e, ep, h, k, npc, clamp=None):
    @case('swiglu_backward_and_per_token_cast', {} if clamp is None else dict(clamp=clamp), e=e, ep=ep, h=h, k=k, npc=npc, send=4001, only='v1')
    def _():
        pos_to_expert, _, pos_to_token_topk, token_topk_to_pos, idx = mapped(4001, k, e, ep, npc)
        rows, n = pos_to_expert.shape[0], idx.shape[0]
        x, grad, w = pair(rows, 2 * h, 'e4m3', (1, npc)), randn(rows, h), rand(n, k)
        f = tk.quant.swiglu_backward_and_per_token_cast
        call = lambda: f(x, grad, w, pos_to_token_topk, token_topk_to_pos, npc, round_sf=True, swiglu_clamp_value=clamp)  # noqa: E731
        return call, (x, grad, w, pos_to_token_topk, token_topk_to_pos)


def swiglu_backward_of_rows(t, h, npc, clamp=None):
    more = {} if clamp is None else dict(clamp=clamp)

    @case('swiglu_backward_and_per_token_cast', more, h=h, npc=npc, recompute=True, t=t, weights=True, only='v2')
    def _():
        x, grad, w = pair(t, 2 * h, 'e4m3', (1, npc)), randn(t, h), rand(t)
        f, options = tk.quant.swiglu_backward_and_per_token_cast, {} if clamp is None else dict(clamp_value=clamp)
        return lambda: f(x, grad, 'e4m3', npc, None, w, None, round_sf=True, do_recompute=True, **options), (x, grad, w)


for clamp in (None, 0.5):
    for npc in (32, 128):
        for e, ep in MOE[:2]:
            swiglu_backward_of_experts(e, ep, H, 8, npc, clamp)
        swiglu_backward_of_rows(32768, H, npc, clamp)
swiglu_backward_of_experts(9, 8, 2048, 2, 32)
swiglu_backward_of_rows(32768, 2048, 128)
for t in SMALL:
    swiglu_backward_of_rows(t, 2048, 128)


@case('swiglu_backward', fmt='bf16', h=2048, recompute=True, t=32768, weights=True, only='v2')
def _():
    x, grad, w = randn(32768, 4096), randn(32768, 2048), rand(32768)
    return lambda: tk.quant.swiglu_backward(x, grad, 'bf16', None, w, None, do_recompute=True), (x, grad, w)


# ---- 2.1.0 only: in place, norms, cast, weight scales ------------------------------------------------------------------------------------
def per_token_cast_and_cast_back(fmt, t):
    @case('per_token_cast_and_cast_back', fmt=fmt, h=H, npc=32, t=t, only='v2')
    def _():
        x = randn(t, H)
        # What it writes is what it reads: counted twice.
        return lambda: tk.quant.per_token_cast_and_cast_back(x, fmt, 32, round_sf=True), (x, x)


def norm_forward(name, residual, t, h=H):
    @case('norm_forward', h=h, input=name, residual=residual, t=t, only='v2')
    def _():
        x, r, w = randn(t, h, to=name), randn(t, h, to=name) if residual else None, randn(h, to=name)
        # Without a residual the third output is the input itself.
        call = lambda: tk.quant.norm_forward(x, w, 1e-6, residual=r, with_rstd=True)[:3 if residual else 2]  # noqa: E731
        return call, (x, r, w)


def norm_forward_and_per_token_cast(t, h=H, residual=False):
    more = dict(residual=True) if residual else {}

    @case('norm_forward_and_per_token_cast', more, h=h, input='bf16', npc=32, t=t, only='v2')
    def _():
        x, r, w = randn(t, h), randn(t, h) if residual else None, randn(h)
        f = tk.quant.norm_forward_and_per_token_cast
        options = dict(residual=r, round_sf=True, use_packed_ue8m0=True, with_rstd=True)
        return lambda: f(x, w, 1e-6, 'e4m3', 32, **options)[:4 if residual else 3], (x, r, w)


def norm_backward(name, t, h=H):
    @case('norm_backward', h=h, input=name, t=t, only='v2')
    def _():
        grad, x, w, rstd = randn(t, h, to=name), randn(t, h, to=name), randn(h, to=name), rand(t)
        weight_grad = torch.zeros(h, device=dev)
        return lambda: tk.quant.norm_backward(grad, x, w, rstd, weight_grad=weight_grad), (grad, x, w, rstd)


def cast(name, out, t):
    @case('cast', h=H, input=name, out=out, t=t, only='v2')
    def _():
        x = randn(t, H, to=name)
        return lambda: tk.quant.cast(x, dtype(out)), x


for fmt in ('e4m3', 'e2m1'):
    per_token_cast_and_cast_back(fmt, T)
norm_forward('bf16', True, T)
norm_forward('bf16', False, T)
norm_forward('bf16', True, 8001, 4096)
norm_forward('f32', True, T)
norm_forward_and_per_token_cast(T)
norm_forward_and_per_token_cast(8001, 4096)
norm_forward_and_per_token_cast(T, residual=True)
norm_backward('bf16', T)
norm_backward('bf16', 8001, 4096)
norm_backward('f32', T)
for name, out in (('f32', 'bf16'), ('bf16', 'e4m3'), ('f32', 'e4m3'), ('bf16', 'f32')):
    cast(name, out, T)
for t in SMALL:
    per_token_cast_and_cast_back('e4m3', t)
    norm_forward('bf16', True, t)
    norm_forward_and_per_token_cast(t)
    norm_backward('bf16', t)
    cast('f32', 'bf16', t)
for b in (128, 32):
    @case('batched_transpose_weight_sf', b=b, g=32, k=H, n=2048, only='v2')
    def _(b=b):
        sf = torch.exp2(torch.randint(-20, 20, (32, 2048 // b, H // b), device=dev).float())
        return lambda: tk.quant.batched_transpose_weight_sf([sf], b, [False], [None]), sf


# ---- routing -----------------------------------------------------------------------------------------------------------------------------
def normalize_weight(k, t):
    @case('normalize_weight', k=k, t=t)
    def _():
        w = rand(t, k)
        return lambda: tk.moe.normalize_weight(w), w


for t in (32768, *SMALL):
    normalize_weight(8, t)
for k in (2, 6, 9, 16, 32):
    normalize_weight(k, 32768)


def routing(send, k, e, ep, tps=(), small=False):
    """The ops that take a table of slots, on the MoE cases of 1.0.0's own benchmark."""
    where, only_v1 = dict(e=e, ep=ep, k=k, send=send), dict(only='v1')

    if not small:
        @case('normalize_weight', where)
        def _():
            w = rand(routed(send, k, e, ep).shape[0], k)
            return lambda: tk.moe.normalize_weight(w), w

    @case('group_count', where, **only_v1)
    def _():
        idx = routed(send, k, e, ep)
        return lambda: tk.moe.group_count(idx, e), idx

    for ka in (k,) if small else (1, k):
        @case('aux_fi', where, ka=ka, **only_v1)
        def _(ka=ka):
            idx = routed(send, k, e, ep)
            return lambda: tk.moe.aux_fi(idx, e, ka), idx

    for tp in tps:
        @case('mask_indices_by_tp', where, tp=tp, **only_v1)
        def _(tp=tp):
            idx = routed(send, k, e, ep)
            return lambda: tk.moe.mask_indices_by_tp(idx, e * ep, ep, 0, tp), idx


def unique(send, k, e, ep, groups):
    # Timed with the copy, as in 1.0.0's own benchmark.
    @case('inplace_unique_group_indices', clone=True, e=e, ep=ep, g=groups, k=k, send=send, only='v1')
    def _():
        idx = torch.div(routed(send, k, e, ep), e * ep // groups, rounding_mode='floor')

        def call():
            copy = idx.clone()
            tk.moe.inplace_unique_group_indices(copy, groups)
            return copy
        return call, idx


for e, ep in MOE:
    routing(4001, 8, e, ep, (2, 4, 8))
for send in SMALL:
    routing(send, 8, 32, 8, (4,), small=True)
    unique(send, 8, 32, 8, 8)
for e, ep, groups in ((9, 8, 8), (9, 8, 72), (32, 8, 8), (32, 8, 16), (4, 64, 8), (4, 64, 16)):
    unique(4001, 8, e, ep, groups)


def topk_sum_and_topk_group_idx(t, e, g, kg, added=2):
    @case('topk_sum_and_topk_group_idx', {} if added == 2 else dict(sum=added), e=e, g=g, kg=kg, t=t, only='v1')
    def _():
        s = rand(t, g, e // g)
        return lambda: tk.moe.topk_sum_and_topk_group_idx(s, added, kg), s


for t in (8001, *SMALL):
    topk_sum_and_topk_group_idx(t, 256, 8, 4)
for e, g, kg, added in ((72, 4, 2, 1), (72, 4, 4, 2), (72, 8, 2, 2), (72, 12, 4, 1), (256, 4, 2, 1), (256, 4, 4, 2), (256, 8, 2, 2), (256, 16, 4, 1)):
    topk_sum_and_topk_group_idx(8001, e, g, kg, added)


# ---- ops of other families that we have --------------------------------------------------------------------------------------------------
for e, k in ((256, 8), (384, 6)):
    @case('topk_gate', e=e, k=k, t=8001)
    def _(e=e, k=k):
        s = rand(8001, e)
        return lambda: tk.moe.topk_gate(s, k), s


GATES = ((0, 0, 72, 1, 6), (0, 0, 32, 2, 6), (0, 0, 64, 2, 6), (0, 0, 96, 2, 6), (0, 0, 16, 2, 6), (0, 0, 36, 2, 6), (0, 0, 108, 2, 6),
         (0, 0, 128, 2, 6), (0, 0, 144, 2, 6), (8, 8, 256, 2, 8), (8, 4, 256, 2, 8))


def top2_sum_gate(t, pad, gate, score):
    g, kg, e, s, k = gate
    s = s if k % s == 0 and e % (k // s) == 0 else 0

    @case('top2_sum_gate', e=e, g=g, k=k, kg=kg, pad=pad, s=s, score=score, t=t, only='v1')
    def _():
        n = t + pad
        logits, bias = randn(n, e, to='f32'), randn(e, to='f32')
        more = dict(unmapped_topk_idx=torch.zeros(n, k, dtype=torch.int64, device=dev))
        if pad:
            more['mask'] = torch.arange(n, device=dev) < t
        if s:
            # 32 more physical experts than logical ones: each row of the map is its own index, 33 times.
            ids = torch.arange(e + s, dtype=torch.int32, device=dev)
            more.update(to_physical_map=ids[:, None].repeat(1, 33).contiguous(), logical_count=torch.ones_like(ids))
        f = tk.moe.top2_sum_gate
        return lambda: f(logits, bias, k, kg, g, s > 0, s, 1.5, 0, 4, 1, 2, score, **more), (logits, bias)


SCORES = ('sigmoid', 'sqrtsoftplus', 'softmax')
for gate in GATES:
    for score in SCORES:
        top2_sum_gate(32, 4, gate, score)
for t in (*SMALL, 4001, 8001):
    for gate in (GATES[10], GATES[0]):
        top2_sum_gate(t, 0, gate, 'sigmoid')
for score in SCORES[1:]:
    top2_sum_gate(8001, 0, GATES[10], score)


def full_gate(t, pad, rnd, s, e=256, k=8):
    @case('moe_topk_gate_forward', e=e, k=k, pad=pad, random=rnd, s=s, t=t, only='v2')
    def _():
        n = t + pad
        coin = lambda: torch.rand(n, device=dev) < 0.5  # noqa: E731
        logits, scores = randn(n, e, to='f32'), torch.empty(n, e, device=dev)
        more = dict(bias=randn(e, to='f32'), image_bias=randn(e, to='f32'), image_token_mask=coin(), scores=scores,
                    unmapped_topk_idx=torch.zeros(n, k, dtype=torch.int64, device=dev),
                    out=(torch.empty(n, k + s, dtype=torch.int64, device=dev), torch.empty(n, k + s, device=dev)))
        if pad:
            more['mask'] = torch.arange(n, device=dev) < t
        if rnd:
            more['force_random'] = coin()
        if s:
            count = torch.randint(1, 4, (e + s,), dtype=torch.int32, device=dev)
            column = torch.arange(3, dtype=torch.int32, device=dev)
            ids = (count.cumsum(0) - count).to(torch.int32)[:, None] + column
            more.update(logical_count=count, to_physical_map=torch.where(column < count[:, None], ids, -1).to(torch.int32).contiguous())
        f = tk.moe.moe_topk_gate_forward
        return lambda: f(logits, k, s > 0, s, 1.5, 0, **more), logits


def full_gate_backward(t, pad, aux, e=256, k=8):
    @case('moe_topk_gate_backward', aux=aux, e=e, k=k, pad=pad, t=t, only='v2')
    def _():
        n = t + pad
        logits, scores, mask = randn(n, e, to='f32'), torch.empty(n, e, device=dev), torch.arange(n, device=dev) < t
        idx, w = tk.moe.moe_topk_gate_forward(logits, k, False, 0, 1.5, 0, mask=mask, scores=scores)
        g = randn(n, k, to='f32')
        more = dict(mask=mask, grad_scores_sum=randn(1, e, to='f32')) if aux else {}
        more['out'] = torch.empty_like(scores)
        f = tk.moe.moe_topk_gate_backward
        return lambda: f(scores, idx, w, g, 1.5, **more), (scores, idx, w, g)


for rnd in (1, 0):
    for s in (0, 2):
        for t in (512, 8001):
            full_gate(t, 0, rnd, s)
            full_gate(t, 10, rnd, s)
for t in (*SMALL, 65536):
    full_gate(t, 0, 0, 0)
for aux in (0, 1):
    for t, pad in ((8001, 0), (8001, 10), *((t, 0) for t in SMALL), (65536, 0)):
        full_gate_backward(t, pad, aux)
    full_gate_backward(8001, 0, aux, 384, 6)
for e, ep in MOE:
    @case('get_fused_mapping', e=e, ep=ep, k=8, send=4001, only='v1')
    def _(e=e, ep=ep):
        *maps, idx = mapped(4001, 8, e, ep, 128)
        rows = maps[0].shape[0]
        return lambda: tk.moe.get_fused_mapping(idx, e, rows, 128), idx


def expand_to_fused(send, e, ep, h=H, k=8):
    @case('expand_to_fused', e=e, ep=ep, h=h, k=k, send=send, only='v1')
    def _():
        pos_to_expert, _, _, token_topk_to_pos, idx = mapped(send, k, e, ep, 128)
        x = randn(idx.shape[0], h)
        return lambda: tk.moe.expand_to_fused(x, token_topk_to_pos, pos_to_expert), (x, token_topk_to_pos, pos_to_expert)


def expand_to_fused_with_sf(send, e, ep, npc, sf, h=H, k=8):
    @case('expand_to_fused_with_sf', e=e, ep=ep, h=h, k=k, npc=npc, send=send, sf=sf, only='v1')
    def _():
        pos_to_expert, _, _, token_topk_to_pos, idx = mapped(send, k, e, ep, 128)
        x = pair(idx.shape[0], h, 'e4m3', (1, npc), 'CP' if sf == 'packed' else 'R')
        f, maps = tk.moe.expand_to_fused_with_sf, (token_topk_to_pos, pos_to_expert)
        # It takes scales by rows only; its own benchmark copies those by columns within what it times, and so does this.
        return lambda: f((x[0], x[1].contiguous()), npc, *maps, sf == 'packed'), (x, maps)


def reduce_fused(send, e, ep, h=H, k=8):
    @case('reduce_fused', e=e, ep=ep, h=h, k=k, send=send, only='v1')
    def _():
        pos_to_expert, _, _, token_topk_to_pos, idx = mapped(send, k, e, ep, 128)
        x, w = randn(pos_to_expert.shape[0], h), rand(*idx.shape)
        return lambda: tk.moe.reduce_fused(x, w, token_topk_to_pos), (x, w, token_topk_to_pos)


def reduce_fused_of_types(e, ep, name, out, scaled, h=H):
    @case('reduce_fused', e=e, ep=ep, h=h, input=name, k=6, out=out, send=4001, x_sf=scaled, only='v1')
    def _():
        pos_to_expert, _, _, token_topk_to_pos, idx = mapped(4001, 6, e, ep, 128)
        x, w, sf = randn(pos_to_expert.shape[0], h, to=name), rand(*idx.shape), rand(1) if out == 'e4m3' else None
        x = (x, rand(x.shape[0])) if scaled else x
        fmt = 'e4m3' if out == 'e4m3' else ''
        return lambda: tk.moe.reduce_fused(x, w, token_topk_to_pos, fmt, sf), (x, w, token_topk_to_pos)


for e, ep in ((32, 8), (4, 64)):
    expand_to_fused(4001, e, ep)
    reduce_fused(4001, e, ep)
expand_to_fused(4001, 9, 8)
expand_to_fused(4001, 9, 8, 2048, 2)
for e, ep in ((9, 8), (32, 8)):
    for npc in (32, 128):
        expand_to_fused_with_sf(4001, e, ep, npc, 'row')
        expand_to_fused_with_sf(4001, e, ep, npc, 'packed')
expand_to_fused_with_sf(4001, 9, 8, 32, 'row', 2048, 2)
for send in SMALL:
    expand_to_fused(send, 32, 8)
    expand_to_fused_with_sf(send, 32, 8, 128, 'row')
    reduce_fused(send, 32, 8)
for e, ep, name, out, scaled, h in (
    (9, 8, 'f32', 'fp32', True, H), (9, 8, 'f32', 'e4m3', False, H), (9, 8, 'bf16', 'e4m3', True, H),
    (32, 8, 'f32', 'fp32', False, H), (32, 8, 'bf16', 'bf16', True, H), (32, 8, 'bf16', 'e4m3', False, H),
    (4, 64, 'f32', 'e4m3', True, H), (4, 64, 'bf16', 'bf16', False, H), (9, 8, 'f32', 'fp32', True, 2048),
):
    reduce_fused_of_types(e, ep, name, out, scaled, h)
def moe_layer(t, e, data, h=H, k=8, alignment=128):
    """The forward steps of a routed layer in one graph: gate, mapping into the rows of the worst case, cast, expand, reduce."""
    @case('moe_layer', a=alignment, data=data, e=e, h=h, k=k, t=t, only='v1')
    def _():
        logits, bias, x = randn(t, e, to='f32'), randn(e, to='f32'), randn(t, h)
        rows = (t * k + (alignment - 1) * min(e, t * k)) // alignment * alignment
        y = randn(rows, h)

        def steps():
            idx, w = tk.moe.top2_sum_gate(logits, bias, k, 0, 0, False, 0, 1.5, 0, 1, 0, 1, 'sqrtsoftplus')
            pos_to_expert, _, _, token_topk_to_pos = tk.moe.get_fused_mapping(idx, e, rows, alignment)[:4]
            if data == 'bf16':
                expanded = tk.moe.expand_to_fused(x, token_topk_to_pos, pos_to_expert)
            else:
                quantised = tk.quant.per_token_cast(x, 'e4m3', 128, **ROW)
                expanded = tk.moe.expand_to_fused_with_sf(quantised, 128, token_topk_to_pos, pos_to_expert, False)
            return expanded, tk.moe.reduce_fused(y, w, token_topk_to_pos)

        # Compiled before the capture, on another stream as PyTorch wants it.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                steps()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = steps()

        def replay():
            graph.replay()
            return out
        return replay, (logits, bias, x, y)


for t, e in ((4096, 256), (4096, 32), (128, 256), (16, 256), (1, 256)):
    for data in ('bf16', 'e4m3'):
        moe_layer(t, e, data)


def batched_transpose(name, b, t=T, h=H):
    @case('batched_transpose', b=b, dtype=name, h=h, t=t, only='v1')
    def _():
        x = randn(b, t, h).to(dtype(name))
        return lambda: tk.transpose.batched_transpose(x), x


def transpose(name, t=T, h=H):
    @case('transpose', dtype=name, h=h, t=t, only='v1')
    def _():
        x = randn(t, h).to(dtype(name))
        return lambda: tk.transpose.transpose(x), x


for b in (8, 32):
    for name in ('bf16', 'e4m3', 'f32'):
        batched_transpose(name, b)
batched_transpose('e4m3', 8, 4032, 2048)
transpose('bf16')
transpose('e4m3')
transpose('e4m3', 4032, 2048)


@case('mhc_post_fwd', h=H, mult=4, t=8192, only='v2')
def _():
    s, m = 8192, 4
    x, r, p, c = randn(1, s, H), randn(1, s, m, H), rand(1, s, m, 1), rand(1, s, m, m)
    return lambda: tk.mhc.mhc_post_fwd(x, r, p, c), (x, r, p, c)


# ---- transform, rand ---------------------------------------------------------------------------------------------------------------------
def apply_rotary(h, positions, interleaved, split):
    @case('apply_rotary', d=64, h=h, head_split=split, interleaved=interleaved, l=8192, positions=positions, only='v2')
    def _():
        q = randn(1, 8192, h + split, 192)[:, :, :h, 128:]
        # Turns, so that values stay what they are however often they are turned.
        angles = rand(8192, 32) * 6.2831853
        cache = torch.cat([angles.cos(), angles.sin()], dim=1)
        at = None if positions == 'none' else torch.randint(0, 8192, (1, 8192), device=dev, dtype=torch.int32)
        f = tk.transform.apply_rotary
        # The query is read and written.
        return lambda: f(query=q, cos_sin_cache=cache, positions=at, interleaved=bool(interleaved)), (q, q, cache, at)


for h in (128, 64, 32, 1):
    for positions in ('i32', 'none'):
        for interleaved in (0, 1):
            for split in (0, 1):
                apply_rotary(h, positions, interleaved, split)
for name in ('f32', 'bf16'):
    for shape in ((4096, 262144), (4096, 4096), (1024, 1024), (128, H), (16, H), (1, H)):
        @case('randn', dtype=name, shape=f'{shape[0]}x{shape[1]}', only='v2')
        def _(name=name, shape=shape):
            x = torch.empty(shape, device=dev, dtype=dtype(name))
            return lambda: tk.rand.randn_like(x), ()


# ---- measure -----------------------------------------------------------------------------------------------------------------------------
shard, shards = map(int, args.shard.split('/'))
names = [f'{op} {name}' for op, name, _ in cases]
doubled = {name for name in names if names.count(name) > 1}
if doubled:
    sys.exit(f'cases stand twice: {sorted(doubled)}')
chosen = [one for one, name in zip(cases, names) if re.search(args.only, name)][shard::shards]
if args.list:
    for op, name, _ in chosen:
        print(op, name)
    sys.exit()

import torch  # noqa: E402
import tile_kernels as tk  # noqa: E402

start = time.time()
flush = None if args.compile_only else torch.empty(512 << 20, dtype=torch.uint8, device=dev)


def nbytes(*ts):
    total = 0
    for t in ts:
        if isinstance(t, (tuple, list)):
            total += nbytes(*t)
        elif isinstance(t, torch.Tensor):
            total += t.numel() * t.element_size()
    return total


def measure(fn):
    fn()
    fn()
    torch.cuda.synchronize()
    times = []
    for _ in range(args.repeats):
        before, after = torch.cuda.Event(True), torch.cuda.Event(True)
        flush.zero_()
        before.record()
        fn()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) * 1e3)
    return times


def emit(op, name, peer=args.peer, **more):
    print(json.dumps({'peer': peer, 'op': op, 'case': name} | more), flush=True)


if not args.compile_only:
    emit('events', '', us=round(statistics.median(measure(lambda: None)), 2))
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device=dev) for _ in range(2))
    us = statistics.median(measure(lambda: b.copy_(a)))
    emit('copy', 'bytes=1GiB', 'copy', us=round(us, 2), gbs=round(2 * (1 << 30) / us / 1e3))
    del a, b
called = 0
for op, name, build in chosen:
    if time.time() - start > args.seconds:
        emit(op, name, error='not reached')
        continue
    try:
        times = []
        for place in range(1 if args.compile_only else 3):
            spacers = [torch.empty(place * n, dtype=torch.uint8, device=dev) for n in (300_000, 3 << 20)]
            # The same data in both releases.
            torch.manual_seed(zlib.crc32(f'{op} {name}'.encode()))
            fn, inputs = build()
            out = fn()
            torch.cuda.synchronize()
            called += place == 0
            if not args.compile_only:
                total = nbytes(inputs) + nbytes(out)
                times += measure(fn)
            fn = inputs = out = spacers = None
            torch.cuda.empty_cache()
            if not times or statistics.mean(times) > 20:
                break
        if times:
            us = statistics.median(times)
            emit(op, name, us=round(us, 2), gbs=round(total / us / 1e3))
    except Exception as error:  # a case that this release can't run is part of the answer
        emit(op, name, error=f'{type(error).__name__}: {error}'[:300])
    fn = inputs = out = None
    torch.cuda.empty_cache()
if args.compile_only:
    print(f'shard {shard}: {called} of {len(chosen)} cases called, {time.time() - start:.0f} s', file=sys.stderr)
