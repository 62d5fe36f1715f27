//! router: the steps of a routed layer, each against its definition; and the benchmark of the whole layer.

use super::common_route::FILL;
use crate::support::bench::{Launch, Row};
use crate::support::cases::Depth;
use crate::support::compare::{allclose, equal};
use crate::support::inputs;
use crate::support::rng::Rng;
use crate::support::suite::{Ctx, Report, Suite, ensure, text};
use crate::support::value::Value;
use ferrotile::moe::max_expanded_tokens;
use ferrotile::moe::moe_topk_gate_backward::AuxGrad;
use ferrotile::moe::router::{Config, Expanded, ExpertLoad, Gate, Load, MoeRouter, Quantise, Routed};
use ferrotile::quant::{Format, Input, SfLayout, SfMut, per_token_cast, sf_shape};
use ferrotile::{Buffer, DType, Device, Stream, TensorMut};
use half::bf16;

/// The checks of this composition.
pub const SUITE: Suite = Suite { op: "router", run };

const FACTOR: f32 = 1.5;

/// Where the routing table comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    /// The gate.
    Gate,
    /// The gate, every fifth token masked, and a balancing loss.
    Masked,
    /// The caller, some choices without an expert.
    Own,
    /// The caller: everything to one expert.
    One,
}

/// What the gate and the caller's side of the layer have.
struct Inputs<X> {
    logits: Vec<f32>,
    bias: Vec<f32>,
    mask: Vec<u8>,
    own_idx: Vec<i64>,
    own_weights: Vec<f32>,
    x: Vec<X>,
    expert_out: Vec<X>,
    grad_out: Vec<X>,
    grad_expanded: Vec<X>,
    grad_scores_sum: Vec<f32>,
}

impl<X: Value> Inputs<X> {
    fn new(config: &Config, t: u64, p: u64, table: Table, name: &str) -> Self {
        let Config { num_experts: e, num_topk: k, hidden: h, .. } = *config;
        let rng = Rng::named(name);
        let normal = |stream: u64, len: u64| rng.stream(stream).normal_f32(len as usize);
        let values = |stream: u64, len: u64| normal(stream, len).into_iter().map(X::round).collect();
        // Different experts in a row, from a random one on.
        let own = rng.stream(7).fill((t * k) as usize, |rng, i| match table {
            Table::One => {
                if i % k == 0 {
                    e as i64 - 1
                } else {
                    -1
                }
            }
            _ if rng.below(i, 4) == 0 => -1,
            _ => ((rng.stream(1).below(i / k, e) + i % k) % e) as i64,
        });
        Self {
            // Values that are equal or far apart, so that the reference in f64 has the same ties and no others.
            logits: normal(0, t * e).into_iter().map(|v| (v * 512.0).round() / 512.0).collect(),
            bias: (0..e).map(|expert| 4.0 * (expert % 3) as f32).collect(),
            mask: (0..t).map(|token| (token % 5 != 3) as u8).collect(),
            own_idx: own,
            own_weights: normal(2, t * k),
            x: values(3, t * h),
            expert_out: values(4, p * h),
            grad_out: values(5, t * h),
            grad_expanded: values(6, p * h),
            grad_scores_sum: normal(8, e),
        }
    }
}

/// Everything on a device, outputs prefilled.
struct OnDevice<X> {
    memory: Buffer<u8>,
    logits: Buffer<f32>,
    bias: Buffer<f32>,
    mask: Buffer<u8>,
    own_idx: Buffer<i64>,
    own_weights: Buffer<f32>,
    x: Buffer<X>,
    expanded: Buffer<u8>,
    expanded_sf: Buffer<u8>,
    expert_out: Buffer<X>,
    out: Buffer<X>,
    grad_out: Buffer<X>,
    grad_expert_out: Buffer<X>,
    grad_expanded: Buffer<X>,
    grad_x: Buffer<X>,
    grad_logits: Buffer<f32>,
    grad_scores_sum: Buffer<f32>,
}

impl<X: Value> OnDevice<X> {
    fn new(device: &Device, router: &MoeRouter, inputs: &Inputs<X>, t: u64) -> ferrotile::Result<Self> {
        fn filled<T: ferrotile::Element>(device: &Device, len: u64) -> ferrotile::Result<Buffer<T>> {
            let mut buffer = device.alloc::<T>(len as usize)?;
            buffer.fill_bytes(FILL)?;
            Ok(buffer)
        }
        let (h, e) = (router.config().hidden, router.config().num_experts);
        let (dtype, [p, columns]) = router.expanded_shape(t);
        let sf = router.expanded_sf_shape(t);
        Ok(Self {
            memory: device.zeros(router.workspace_bytes() as usize)?,
            logits: device.upload(&inputs.logits)?,
            bias: device.upload(&inputs.bias)?,
            mask: device.upload(&inputs.mask)?,
            own_idx: device.upload(&inputs.own_idx)?,
            own_weights: device.upload(&inputs.own_weights)?,
            x: device.upload(&inputs.x)?,
            expanded: filled(device, p * columns * dtype.size())?,
            expanded_sf: filled(device, sf.map_or(0, |sf| sf.elements * sf.dtype.size()))?,
            expert_out: device.upload(&inputs.expert_out)?,
            out: filled(device, t * h)?,
            grad_out: device.upload(&inputs.grad_out)?,
            grad_expert_out: filled(device, if router.config().backward { p * h } else { 0 })?,
            grad_expanded: device.upload(&inputs.grad_expanded)?,
            grad_x: filled(device, if router.config().backward { t * h } else { 0 })?,
            grad_logits: filled(device, t * e)?,
            grad_scores_sum: device.upload(&inputs.grad_scores_sum)?,
        })
    }

    /// All steps, forward and backward. Launches only.
    fn steps(&mut self, stream: &Stream, router: &MoeRouter, t: u64, table: Table) -> ferrotile::Result<()> {
        let Config { num_experts: e, num_topk: k, hidden: h, backward, .. } = *router.config();
        let mut routed = router.routed(self.memory.tensor_mut(&[router.workspace_bytes()])?, t)?;
        let p = routed.num_expanded_tokens();
        if matches!(table, Table::Gate | Table::Masked) {
            let masked = table == Table::Masked;
            let bias = Some(self.bias.tensor(&[e])?);
            let mask = if masked { Some(self.mask.tensor(&[t])?) } else { None };
            routed.gate(stream, Gate { logits: self.logits.tensor(&[t, e])?, bias, image_bias: None, mask })?;
        } else {
            let mut table = routed.routing_mut()?;
            stream.copy(&mut table.topk_idx, &self.own_idx.tensor(&[t, k])?)?;
            stream.copy(&mut table.topk_weights, &self.own_weights.tensor(&[t, k])?)?;
        }
        let out = expanded(router, t, &mut self.expanded, &mut self.expanded_sf)?;
        routed.dispatch(stream, self.x.tensor(&[t, h])?, out)?;
        routed.combine(stream, self.expert_out.tensor(&[p, h])?, self.out.tensor_mut(&[t, h])?)?;
        if backward {
            let (expert_out, grad_out) = (self.expert_out.tensor(&[p, h])?, self.grad_out.tensor(&[t, h])?);
            routed.backward_combine(stream, expert_out, grad_out, self.grad_expert_out.tensor_mut(&[p, h])?)?;
            routed.backward_dispatch(stream, self.grad_expanded.tensor(&[p, h])?, self.grad_x.tensor_mut(&[t, h])?)?;
            if matches!(table, Table::Gate | Table::Masked) {
                let aux = AuxGrad { mask: self.mask.tensor(&[t])?, grad_scores_sum: self.grad_scores_sum.tensor(&[1, e])? };
                let aux = if table == Table::Masked { Some(aux) } else { None };
                routed.backward_gate(stream, aux, self.grad_logits.tensor_mut(&[t, e])?)?;
            }
        }
        Ok(())
    }

    fn routed(&mut self, router: &MoeRouter, t: u64) -> ferrotile::Result<Routed<'_>> {
        router.routed(self.memory.tensor_mut(&[router.workspace_bytes()])?, t)
    }
}

/// The expanded buffer in memory of the right size.
fn expanded<'a>(router: &MoeRouter, t: u64, data: &'a mut Buffer<u8>, sf: &'a mut Buffer<u8>) -> ferrotile::Result<Expanded<'a>> {
    let (dtype, shape) = router.expanded_shape(t);
    let device = *data.device();
    // SAFETY: the buffer has as many bytes, and the tensor lives as long as its borrow.
    let data = unsafe { TensorMut::from_raw(&device, data.as_ptr(), dtype, &shape, &[shape[1], 1])? };
    Ok(match (router.expanded_sf_shape(t), router.config().quantise) {
        (Some(shape), Some(quantise)) => {
            // SAFETY: as above.
            let tensor = unsafe { TensorMut::from_raw(&device, sf.as_ptr(), shape.dtype, &shape.shape, &shape.strides)? };
            Expanded::Quantised { data, sf: SfMut { tensor, layout: quantise.layout } }
        }
        _ => Expanded::Plain(data),
    })
}

/// The best experts and their weights, in f64.
fn gate(logits: &[f32], bias: &[f32], mask: Option<&[u8]>, e: usize, k: usize) -> (Vec<i64>, Vec<f64>) {
    let (mut idx, mut weights) = (Vec::new(), Vec::new());
    for (token, logits) in logits.chunks(e).enumerate() {
        if mask.is_some_and(|mask| mask[token] == 0) {
            idx.extend(vec![-1; k]);
            weights.extend(vec![0.0; k]);
            continue;
        }
        let scores: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp().ln_1p().sqrt()).collect();
        let value = |expert: usize| scores[expert] + f64::from(bias[expert]);
        let mut order: Vec<usize> = (0..e).collect();
        order.sort_by(|a, b| value(*b).total_cmp(&value(*a)));
        let sum: f64 = order[..k].iter().map(|expert| scores[*expert]).sum();
        idx.extend(order[..k].iter().map(|expert| *expert as i64));
        weights.extend(order[..k].iter().map(|expert| scores[*expert] / sum * f64::from(FACTOR)));
    }
    (idx, weights)
}

/// The gradient of `sum(weights * grad)` and of `sum(scores / sum(scores) * h)`, by the chain rule in f64.
fn gate_backward(logits: &[f32], idx: &[i64], grad: &[f32], aux: Option<(&[u8], &[f32])>, e: usize, k: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for (token, logits) in logits.chunks(e).enumerate() {
        let scores: Vec<f64> = logits.iter().map(|x| f64::from(*x).exp().ln_1p().sqrt()).collect();
        let mut of_scores = vec![0.0; e];
        let chosen: Vec<(usize, f64)> =
            (0..k).map(|i| token * k + i).filter(|i| idx[*i] >= 0).map(|i| (idx[i] as usize, f64::from(grad[i]))).collect();
        let sum: f64 = chosen.iter().map(|(expert, _)| scores[*expert]).sum();
        let mean: f64 = chosen.iter().map(|(expert, grad)| scores[*expert] * grad).sum::<f64>() / sum;
        for (expert, grad) in &chosen {
            of_scores[*expert] += f64::from(FACTOR) * (grad - mean) / sum;
        }
        let routed = !chosen.is_empty();
        if let Some((mask, h)) = aux
            && mask[token] != 0
        {
            let sum: f64 = scores.iter().sum();
            let mean: f64 = scores.iter().zip(h).map(|(u, h)| u * f64::from(*h)).sum::<f64>() / sum;
            of_scores.iter_mut().zip(h).for_each(|(of, h)| *of += (f64::from(*h) - mean) / sum);
        }
        // d sqrt(softplus(x)) / dx = sigmoid(x) / (2 * score).
        let slope = |x: f32, u: f64| 1.0 / (1.0 + (-f64::from(x)).exp()) / (2.0 * u);
        out.extend(scores.iter().zip(logits).zip(of_scores).map(|((u, x), of)| if routed { of * slope(*x, *u) } else { 0.0 }));
    }
    out
}

/// Row of each choice, token of each row, what became of the choices: experts one after the other, their choices in order.
fn layout(idx: &[i64], k: usize, e: usize, alignment: u64, p: u64) -> (Vec<Option<usize>>, Vec<Option<usize>>, Load) {
    let (mut rows, mut sources) = (vec![None; idx.len()], vec![None; p as usize]);
    let mut load = Load { experts: vec![], num_expanded_tokens: p, needed: 0 };
    for expert in 0..e as i64 {
        let mut of_expert = ExpertLoad::default();
        let start = load.needed;
        for slot in (0..idx.len()).filter(|slot| idx[*slot] == expert) {
            if load.needed < p {
                rows[slot] = Some(load.needed as usize);
                sources[load.needed as usize] = Some(slot / k);
                of_expert.rows += 1;
            } else {
                of_expert.dropped += 1;
            }
            load.needed += 1;
        }
        load.needed = start + (load.needed - start).next_multiple_of(alignment);
        of_expert.padding = load.needed.min(p) - start.min(p) - of_expert.rows;
        load.experts.push(of_expert);
    }
    (rows, sources, load)
}

/// Tokens quantised by the op for that, as rows of bytes: data, and scales one word after the other.
fn quantised<X: Value>(device: &Device, x: &[X], t: u64, h: u64, quantise: Quantise) -> ferrotile::Result<(Vec<u8>, Vec<u8>)> {
    let Quantise { format, num_per_channels, round_sf, layout } = quantise;
    let layout = if layout.is_packed() { SfLayout::RowMajorPacked } else { SfLayout::RowMajor };
    let shape = sf_shape(t, h, (1, num_per_channels), layout);
    let columns = format.columns(h);
    let x = device.upload(x)?;
    let (mut data, mut sf) = (device.zeros::<u8>((t * columns) as usize)?, device.zeros::<u8>((4 * shape.elements) as usize)?);
    // SAFETY: the buffers have as many bytes, and the tensors are gone before them.
    let (out, tensor) = unsafe {
        (
            TensorMut::from_raw(device, data.as_ptr(), format.dtype(), &[t, columns], &[columns, 1])?,
            TensorMut::from_raw(device, sf.as_ptr(), shape.dtype, &shape.shape, &shape.strides)?,
        )
    };
    let args = per_token_cast::Args {
        x: Input::Plain(x.tensor(&[t, h])?),
        npc: num_per_channels,
        round_sf,
        stochastic: false,
        out,
        sf: SfMut { tensor, layout },
    };
    per_token_cast::per_token_cast(&device.stream()?, args)?;
    // Whatever stream it ran on: reading waits for the device.
    data.tensor_mut(&[0])?;
    sf.tensor_mut(&[0])?;
    Ok((data.to_vec()?, sf.to_vec()?))
}

fn bytes_of<X: Value>(values: &[X]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// One batch, forward and backward, each step against its definition, given what the step before has left.
fn check<X: Value>(device: &Device, config: Config, t: u64, table: Table, name: &str) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let router = MoeRouter::new(config).map_err(text)?;
    let p = router.num_expanded_tokens(t);
    let inputs = Inputs::<X>::new(&config, t, p, table, name);
    let mut on_device = OnDevice::new(device, &router, &inputs, t).map_err(text)?;
    on_device.steps(&stream, &router, t, table).map_err(text)?;
    stream.synchronize().map_err(text)?;
    verify(&stream, &router, &inputs, &mut on_device, t, table, name)
}

fn verify<X: Value>(
    stream: &Stream,
    router: &MoeRouter,
    inputs: &Inputs<X>,
    on_device: &mut OnDevice<X>,
    t: u64,
    table: Table,
    name: &str,
) -> Result<(), String> {
    let device = stream.device();
    let Config { num_experts, num_topk, hidden, alignment, backward, quantise, .. } = *router.config();
    let (e, k, h, p) = (num_experts as usize, num_topk as usize, hidden as usize, router.num_expanded_tokens(t));
    let shape = [t, num_topk];

    // What the workspace holds.
    let (mut idx_copy, mut weights_copy) = (device.alloc::<i64>(t as usize * k), device.alloc::<f32>(t as usize * k));
    let mut grads_copy = device.zeros::<f32>(t as usize * k).map_err(text)?;
    let (idx_copy, weights_copy) =
        (idx_copy.as_mut().map_err(|e| e.to_string())?, weights_copy.as_mut().map_err(|e| e.to_string())?);
    let routed = on_device.routed(router, t).map_err(text)?;
    let mut copies = || -> ferrotile::Result<Load> {
        stream.copy(&mut idx_copy.tensor_mut(&shape)?, &routed.topk_idx()?)?;
        stream.copy(&mut weights_copy.tensor_mut(&shape)?, &routed.topk_weights()?)?;
        if backward {
            stream.copy(&mut grads_copy.tensor_mut(&shape)?, &routed.grad_topk_weights()?)?;
        }
        routed.load(stream)
    };
    let load = copies().map_err(text)?;
    let idx = idx_copy.to_vec().map_err(text)?;
    let weights = weights_copy.to_vec().map_err(text)?;
    let grad_weights = grads_copy.to_vec().map_err(text)?;

    let masked = table == Table::Masked;
    if matches!(table, Table::Gate | Table::Masked) {
        let mask = masked.then_some(&inputs.mask[..]);
        let (expected, of_expected) = gate(&inputs.logits, &inputs.bias, mask, e, k);
        equal("topk_idx", name, &shape, &idx, &expected)?;
        allclose("topk_weights", name, &shape, &weights, &of_expected, (0.0, 2e-6))?;
    } else {
        equal("topk_idx", name, &shape, &idx, &inputs.own_idx)?;
        equal("topk_weights", name, &shape, &weights, &inputs.own_weights)?;
    }

    let (rows, sources, expected_load) = layout(&idx, k, e, alignment.into(), p);
    ensure(load == expected_load, || format!("load is {load:?}, expected {expected_load:?}; {name}"))?;
    ensure(load.rows() + load.dropped() == idx.iter().filter(|i| **i >= 0).count() as u64, || {
        format!("choices are lost; {name}")
    })?;

    // Rows of bytes, by token, then by row.
    let (data, sf) = match quantise {
        Some(quantise) => quantised(device, &inputs.x, t, hidden, quantise).map_err(text)?,
        None => (bytes_of(&inputs.x), vec![]),
    };
    let row_bytes = |all: &[u8]| all.len().checked_div(t as usize).unwrap_or(0);
    let gathered = |all: &[u8]| -> Vec<Vec<u8>> {
        let len = row_bytes(all);
        sources.iter().map(|source| source.map_or(vec![0; len], |token| all[token * len..(token + 1) * len].to_vec())).collect()
    };
    // Without tokens a row is as long as the buffer says.
    let got = on_device.expanded.to_vec().map_err(text)?;
    if t > 0 {
        equal("expanded", name, &[p, row_bytes(&data) as u64], &got, &gathered(&data).concat())?;
    }
    if let (Some(of), true) = (router.expanded_sf_shape(t), t > 0) {
        let got = on_device.expanded_sf.to_vec().map_err(text)?;
        for (row, expected) in gathered(&sf).iter().enumerate() {
            for (column, word) in expected.chunks_exact(4).enumerate() {
                let at = 4 * (row * of.strides[0] as usize + column * of.strides[1] as usize);
                ensure(&got[at..at + 4] == word, || {
                    format!("scale of row {row}, column {column} is {:?}, expected {word:?}; {name}", &got[at..at + 4])
                })?;
            }
        }
    }

    // Sums in ascending order of the choices, one fma each.
    let sum = |values: &[X], weighted: bool| -> Vec<X> {
        let mut out = Vec::with_capacity(t as usize * h);
        for token in 0..t as usize {
            for column in 0..h {
                let mut acc = 0.0f32;
                for slot in token * k..(token + 1) * k {
                    if let Some(row) = rows[slot] {
                        acc = values[row * h + column].widen().mul_add(if weighted { weights[slot] } else { 1.0 }, acc);
                    }
                }
                out.push(X::round(acc));
            }
        }
        out
    };
    equal("out", name, &[t, hidden], &on_device.out.to_vec().map_err(text)?, &sum(&inputs.expert_out, true))?;
    if !backward {
        return Ok(());
    }

    let mut grad_expert_out = vec![X::default(); p as usize * h];
    for (slot, row) in rows.iter().enumerate() {
        let grad = |column: usize| inputs.grad_out[slot / k * h + column].widen();
        let Some(row) = *row else {
            ensure(grad_weights[slot].to_bits() == 0, || format!("choice {slot} has no row but a gradient; {name}"))?;
            continue;
        };
        let (mut dot, mut size) = (0.0, 0.0);
        for column in 0..h {
            grad_expert_out[row * h + column] = X::round(grad(column) * weights[slot]);
            let product = f64::from(grad(column)) * f64::from(inputs.expert_out[row * h + column].widen());
            dot += product;
            size += product.abs();
        }
        // The bound of the op's documentation.
        let bound = (hidden / 256 + 18) as f64 * 2f64.powi(-24) * size;
        ensure((f64::from(grad_weights[slot]) - dot).abs() <= bound, || {
            format!("the weight of choice {slot} has gradient {}, expected {dot}; {name}", grad_weights[slot])
        })?;
    }
    equal("grad_expert_out", name, &[p, hidden], &on_device.grad_expert_out.to_vec().map_err(text)?, &grad_expert_out)?;
    equal("grad_x", name, &[t, hidden], &on_device.grad_x.to_vec().map_err(text)?, &sum(&inputs.grad_expanded, false))?;
    if matches!(table, Table::Gate | Table::Masked) {
        let aux = masked.then_some((&inputs.mask[..], &inputs.grad_scores_sum[..]));
        let expected = gate_backward(&inputs.logits, &idx, &grad_weights, aux, e, k);
        let largest = expected.iter().fold(0.0f64, |largest, v| largest.max(v.abs()));
        let got = on_device.grad_logits.to_vec().map_err(text)?;
        allclose("grad_logits", name, &[t, num_experts], &got, &expected, (1e-5 * largest, 1e-5))?;
    }
    Ok(())
}

fn config(e: u64, k: u64, h: u64, max_tokens: u64, alignment: u32, dtype: DType) -> Config {
    Config {
        num_experts: e,
        num_topk: k,
        hidden: h,
        dtype,
        max_tokens,
        alignment,
        max_expanded_tokens: None,
        routed_scaling_factor: FACTOR,
        quantise: None,
        backward: true,
    }
}

const E4M3: Quantise = Quantise { format: Format::E4m3, num_per_channels: 32, round_sf: false, layout: SfLayout::RowMajor };

fn run(ctx: &Ctx) -> Result<Report, String> {
    let device = &ctx.device;
    let full = ctx.depth == Depth::Full;
    let quantise = [
        None,
        Some(E4M3),
        Some(Quantise { layout: SfLayout::ColMajorPacked, round_sf: true, ..E4M3 }),
        Some(Quantise { format: Format::E2m1, layout: SfLayout::ColMajor, num_per_channels: 16, ..E4M3 }),
        Some(Quantise { layout: SfLayout::RowMajorPacked, round_sf: true, num_per_channels: 128, ..E4M3 }),
    ];
    let sizes: &[(u64, u64, u64, u64, u32)] = if full {
        &[(0, 8, 2, 64, 4), (1, 256, 8, 7168, 128), (128, 256, 8, 2048, 128), (4001, 64, 6, 576, 16), (2003, 256, 8, 2048, 64)]
    } else {
        &[(0, 8, 2, 64, 4), (1, 16, 4, 96, 8), (37, 8, 2, 64, 4), (61, 72, 6, 40, 1), (13, 4, 4, 36, 128)]
    };
    let mut turn = 0;
    for &(t, e, k, h, alignment) in sizes {
        for table in [Table::Gate, Table::Masked, Table::Own, Table::One] {
            let name = format!("t={t},e={e},k={k},h={h},a={alignment},{table:?}");
            turn += 1;
            if !ctx.case(&name) {
                continue;
            }
            // More room in the workspace than this batch needs, now and then.
            let base = config(e, k, h, t + turn as u64 % 3, alignment, DType::Bf16);
            check::<bf16>(device, base, t, table, &name)?;
            let quantise = quantise[turn % quantise.len()];
            check::<f32>(device, Config { dtype: DType::F32, quantise, ..base }, t, table, &format!("{name},f32,{quantise:?}"))?;
            check::<bf16>(device, Config { quantise, backward: false, ..base }, t, table, &format!("{name},{quantise:?}"))?;
        }
    }
    if ctx.case("too few rows") {
        for (i, rows) in [0, 1, 17, 40, 59, 1 << 40].into_iter().enumerate() {
            let table = [Table::Own, Table::One, Table::Gate][i % 3];
            let base = Config { max_expanded_tokens: Some(rows), ..config(8, 2, 40, 37, 4, DType::F32) };
            let name = format!("at most {rows} rows");
            check::<f32>(device, base, 37, table, &name)?;
            check::<f32>(device, Config { quantise: Some(E4M3), ..base }, 37, table, &name)?;
        }
    }
    if ctx.case("one workspace") {
        one_workspace(device)?;
    }
    if ctx.case("twice") {
        twice(device)?;
    }
    if !device.is_emulator() && ctx.case("graph") {
        graph(device)?;
    }
    Ok(ctx.report())
}

/// One workspace serves batches of any size in turn, and each finds only what is its own.
fn one_workspace(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let router = MoeRouter::new(config(8, 3, 40, 64, 16, DType::Bf16)).map_err(text)?;
    let mut memory = Some(device.zeros::<u8>(router.workspace_bytes() as usize).map_err(text)?);
    for (i, t) in [64, 1, 0, 33, 64].into_iter().enumerate() {
        let (name, table) = (format!("one workspace,{i}"), [Table::Own, Table::Gate][i % 2]);
        let inputs = Inputs::<bf16>::new(router.config(), t, router.num_expanded_tokens(t), table, &name);
        let mut on_device = OnDevice::new(device, &router, &inputs, t).map_err(text)?;
        if let Some(memory) = memory.take() {
            on_device.memory = memory;
        }
        on_device.steps(&stream, &router, t, table).map_err(text)?;
        verify(&stream, &router, &inputs, &mut on_device, t, table, &name)?;
        memory = Some(on_device.memory);
    }
    Ok(())
}

/// Two runs give the same bytes.
fn twice(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    let router = MoeRouter::new(Config { quantise: Some(E4M3), ..config(16, 4, 96, 50, 8, DType::Bf16) }).map_err(text)?;
    let inputs = Inputs::<bf16>::new(router.config(), 50, router.num_expanded_tokens(50), Table::Masked, "twice");
    let once = || -> ferrotile::Result<Vec<Vec<u8>>> {
        let mut on_device = OnDevice::new(device, &router, &inputs, 50)?;
        on_device.steps(&stream, &router, 50, Table::Masked)?;
        stream.synchronize()?;
        results(&on_device)
    };
    let (first, second) = (once().map_err(text)?, once().map_err(text)?);
    for (first, second) in first.iter().zip(&second) {
        equal("second run", "twice", &[first.len() as u64], second, first)?;
    }
    Ok(())
}

/// All that a caller gets.
fn results<X: Value>(on_device: &OnDevice<X>) -> ferrotile::Result<Vec<Vec<u8>>> {
    Ok(vec![
        on_device.expanded.to_vec()?,
        on_device.expanded_sf.to_vec()?,
        bytes_of(&on_device.out.to_vec()?),
        bytes_of(&on_device.grad_expert_out.to_vec()?),
        bytes_of(&on_device.grad_x.to_vec()?),
        bytemuck::cast_slice(&on_device.grad_logits.to_vec()?).to_vec(),
    ])
}

/// All steps, forward and backward, in one graph; it does its work at every replay on the data that are there then.
fn graph(device: &Device) -> Result<(), String> {
    let stream = device.stream().map_err(text)?;
    for (i, quantise) in [None, Some(E4M3)].into_iter().enumerate() {
        let t = [300, 3000][i];
        let router = MoeRouter::new(Config { quantise, ..config(64, 6, 512, t, 64, DType::Bf16) }).map_err(text)?;
        let make = |name: &str| Inputs::<bf16>::new(router.config(), t, router.num_expanded_tokens(t), Table::Masked, name);
        let mut on_device = OnDevice::new(device, &router, &make("graph 0"), t).map_err(text)?;
        // Compiled before the capture.
        on_device.steps(&stream, &router, t, Table::Masked).map_err(text)?;
        let graph = stream.capture(|stream| on_device.steps(stream, &router, t, Table::Masked)).map_err(text)?;
        for name in ["graph 1", "graph 2"] {
            let inputs = make(name);
            let OnDevice { logits, x, bias, expert_out, grad_out, grad_expanded, grad_scores_sum, .. } = &mut on_device;
            logits.copy_from(&inputs.logits).map_err(text)?;
            bias.copy_from(&inputs.bias).map_err(text)?;
            x.copy_from(&inputs.x).map_err(text)?;
            expert_out.copy_from(&inputs.expert_out).map_err(text)?;
            grad_out.copy_from(&inputs.grad_out).map_err(text)?;
            grad_expanded.copy_from(&inputs.grad_expanded).map_err(text)?;
            grad_scores_sum.copy_from(&inputs.grad_scores_sum).map_err(text)?;
            graph.launch(&stream).map_err(text)?;
            stream.synchronize().map_err(text)?;
            verify(&stream, &router, &inputs, &mut on_device, t, Table::Masked, name)?;
        }
    }
    Ok(())
}

/// A routed layer's forward steps in one graph: gate, mapping, (cast,) expand, reduce. The rows are those of the worst case, as both sides
/// have to take them that do not wait for the counts.
pub fn bench() -> Vec<Row> {
    let mut rows = Vec::new();
    for (t, e) in [(4096, 256), (4096, 32), (128, 256), (16, 256), (1, 256)] {
        for quantise in [None, Some(Quantise { num_per_channels: 128, round_sf: true, ..E4M3 })] {
            rows.push(row(t, e, quantise));
        }
    }
    rows
}

fn row(t: u64, e: u64, quantise: Option<Quantise>) -> Row {
    let (k, h, alignment) = (8, 7168, 128);
    let p = max_expanded_tokens(t, k, e, alignment);
    let data = if quantise.is_some() { "e4m3" } else { "bf16" };
    // Each tensor once for each step that reads or writes it.
    let expanded = if quantise.is_some() { h + h / 32 } else { 2 * h };
    let cast = if quantise.is_some() { t * (2 * h + expanded) } else { 0 };
    let (gate, mapping) = (4 * t * e + 12 * t * k, 12 * t * k + 12 * p);
    let bytes = gate + mapping + cast + (t + p) * expanded + 2 * h * (t * k + t);
    let build = move |device: &Device, stream: &Stream| -> Result<Launch, String> {
        let config = Config { quantise, backward: false, ..config(e, k, h, t, alignment, DType::Bf16) };
        let router = MoeRouter::new(config).map_err(text)?;
        let rng = Rng::named("moe_layer");
        let inputs = Inputs {
            logits: rng.normal_f32((t * e) as usize),
            bias: rng.stream(1).normal_f32(e as usize),
            mask: vec![],
            own_idx: vec![],
            own_weights: vec![],
            x: vec![],
            expert_out: vec![],
            grad_out: vec![],
            grad_expanded: vec![],
            grad_scores_sum: vec![],
        };
        let mut layer = OnDevice::new(device, &router, &inputs, t).map_err(text)?;
        (layer.x, layer.expert_out) = (inputs::normal_bf16(device, 0, t * h)?, inputs::normal_bf16(device, 1, p * h)?);
        // Compiled before the capture.
        layer.steps(stream, &router, t, Table::Gate).map_err(text)?;
        stream.synchronize().map_err(text)?;
        if device.is_emulator() {
            return Ok(Box::new(move |stream| layer.steps(stream, &router, t, Table::Gate)));
        }
        let graph = stream.capture(|stream| layer.steps(stream, &router, t, Table::Gate)).map_err(text)?;
        Ok(Box::new(move |stream| {
            // The graph uses its memory.
            let _alive = &layer;
            graph.launch(stream)
        }))
    };
    Row { op: "moe_layer", case: format!("a={alignment},data={data},e={e},h={h},k={k},t={t}"), bytes, build: Box::new(build) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotile::Error;

    #[test]
    fn suite() {
        SUITE.test();
    }

    #[test]
    fn configurations_are_checked() {
        let fine = config(8, 2, 64, 10, 4, DType::Bf16);
        MoeRouter::new(fine).unwrap();
        let refused = |config: Config, arg: &str| {
            let error = MoeRouter::new(config).unwrap_err();
            assert!(error.to_string().starts_with(&format!("moe_router: {arg} is ")), "{error}");
        };
        refused(Config { num_experts: 0, ..fine }, "num_experts");
        refused(Config { num_experts: 1025, ..fine }, "num_experts");
        refused(Config { num_topk: 9, ..fine }, "num_topk");
        refused(Config { num_topk: 0, ..fine }, "num_topk");
        refused(Config { hidden: 0, ..fine }, "hidden");
        refused(Config { hidden: 1 << 31, ..fine }, "hidden");
        refused(Config { max_tokens: 1 << 30, ..fine }, "max_tokens");
        refused(Config { max_tokens: u64::MAX, ..fine }, "max_tokens");
        refused(Config { alignment: 0, ..fine }, "alignment");
        refused(Config { alignment: u32::MAX, ..fine }, "alignment");
        refused(Config { dtype: DType::E4m3, ..fine }, "dtype");
        refused(Config { routed_scaling_factor: f32::NAN, ..fine }, "routed_scaling_factor");
        let quantise = |quantise: Quantise| Config { quantise: Some(quantise), ..fine };
        refused(quantise(Quantise { num_per_channels: 48, ..E4M3 }), "num_per_channels");
        refused(quantise(Quantise { layout: SfLayout::RowMajorE4m3, ..E4M3 }), "layout");
        refused(quantise(Quantise { layout: SfLayout::RowMajorPacked, ..E4M3 }), "round_sf with a packed layout");
        refused(Config { hidden: 65, ..quantise(Quantise { format: Format::E2m1, ..E4M3 }) }, "hidden");
        // The largest ones do not overflow on their way to a number of bytes.
        let huge =
            Config { num_experts: 1024, num_topk: 1, hidden: (1 << 31) - 1, max_tokens: (1 << 31) - 1, alignment: 1, ..fine };
        assert!(MoeRouter::new(Config { quantise: Some(E4M3), ..huge }).unwrap().workspace_bytes() > 1 << 61);
    }

    #[test]
    fn rows_follow_from_the_numbers() {
        let router = MoeRouter::new(config(8, 2, 64, 10, 4, DType::Bf16)).unwrap();
        assert_eq!([0, 1, 2, 10].map(|t| router.num_expanded_tokens(t)), [0, 8, 16, 44]);
        let fewer = Config { max_expanded_tokens: Some(12), ..*router.config() };
        let fewer = MoeRouter::new(fewer).unwrap();
        assert_eq!([0, 1, 2, 10].map(|t| fewer.num_expanded_tokens(t)), [0, 8, 12, 12]);
        assert!(fewer.workspace_bytes() <= router.workspace_bytes());
        assert_eq!(router.expanded_sf_shape(10), None);
    }

    /// Every documented mistake is a typed error that names the argument; the caller's outputs are untouched.
    #[test]
    fn mistakes_are_errors() {
        let device = Device::emulator().checked();
        let stream = device.stream().unwrap();
        let router = MoeRouter::new(config(8, 2, 64, 10, 4, DType::F32)).unwrap();
        let bytes = router.workspace_bytes();
        let inputs = Inputs::<f32>::new(router.config(), 10, 44, Table::Own, "mistakes");
        let mut on_device = OnDevice::new(&device, &router, &inputs, 10).unwrap();
        let untouched = results(&on_device).unwrap();
        let spare = device.zeros::<f32>(1 << 14).unwrap();
        let mut room = device.zeros::<f32>(1 << 14).unwrap();
        let mut narrow = device.zeros::<bf16>(1 << 14).unwrap();
        let mut memory = device.zeros::<u8>(bytes as usize + 512).unwrap();
        let kind = |result: ferrotile::Result<()>, arg: &str| {
            let error = result.expect_err(arg);
            let named = match &error {
                Error::Shape { arg, .. } | Error::DType { arg, .. } | Error::Layout { arg, .. } | Error::Value { arg, .. } => arg,
                Error::Overlap { b, .. } => b,
                Error::DeviceMismatch { arg, .. } => arg,
                _ => "",
            };
            assert_eq!(named, arg, "{error}");
        };

        kind(router.routed(memory.tensor_mut(&[bytes - 1]).unwrap(), 10).map(drop), "workspace");
        kind(router.routed(memory.strided_mut(&[bytes], &[1], 8).unwrap(), 10).map(drop), "workspace");
        kind(router.routed(room.tensor_mut(&[1 << 14]).unwrap(), 10).map(drop), "workspace");
        kind(router.routed(memory.tensor_mut(&[bytes]).unwrap(), 11).map(drop), "num_tokens");

        let mut routed = router.routed(memory.tensor_mut(&[bytes]).unwrap(), 10).unwrap();
        let x = on_device.x.tensor(&[10, 64]).unwrap();
        kind(
            routed.gate(&stream, Gate { logits: spare.tensor(&[10, 12]).unwrap(), bias: None, image_bias: None, mask: None }),
            "logits",
        );
        macro_rules! out {
            () => {
                expanded(&router, 10, &mut on_device.expanded, &mut on_device.expanded_sf).unwrap()
            };
        }
        kind(routed.dispatch(&stream, spare.tensor(&[9, 64]).unwrap(), out!()), "x");
        kind(routed.dispatch(&stream, spare.strided(&[10, 64], &[200, 2], 0).unwrap(), out!()), "x");
        kind(routed.dispatch(&stream, narrow.tensor(&[10, 64]).unwrap(), out!()), "x");
        kind(routed.dispatch(&stream, x, Expanded::Plain(room.tensor_mut(&[43, 64]).unwrap())), "out");
        kind(routed.dispatch(&stream, x, Expanded::Plain(narrow.tensor_mut(&[44, 64]).unwrap())), "out");
        let sf = SfMut { tensor: narrow.tensor_mut(&[1, 1]).unwrap(), layout: SfLayout::RowMajor };
        kind(routed.dispatch(&stream, x, Expanded::Quantised { data: room.tensor_mut(&[44, 64]).unwrap(), sf }), "out");
        // SAFETY: refused before anything is touched.
        let over = unsafe { TensorMut::from_raw(&device, on_device.x.as_ptr(), DType::F32, &[44, 64], &[64, 1]).unwrap() };
        kind(routed.dispatch(&stream, x, Expanded::Plain(over)), "out");

        let rows = on_device.expert_out.tensor(&[44, 64]).unwrap();
        kind(
            routed.combine(&stream, spare.tensor(&[43, 64]).unwrap(), on_device.out.tensor_mut(&[10, 64]).unwrap()),
            "expert_out",
        );
        kind(routed.combine(&stream, rows, room.tensor_mut(&[10, 63]).unwrap()), "out");
        let grad_out = on_device.grad_out.tensor(&[10, 64]).unwrap();
        kind(routed.backward_combine(&stream, rows, rows, room.tensor_mut(&[44, 64]).unwrap()), "grad_out");
        kind(routed.backward_combine(&stream, rows, grad_out, room.tensor_mut(&[45, 64]).unwrap()), "grad_expert_out");
        kind(routed.backward_dispatch(&stream, grad_out, room.tensor_mut(&[10, 64]).unwrap()), "grad_expanded");
        kind(routed.backward_dispatch(&stream, rows, room.tensor_mut(&[44, 64]).unwrap()), "grad_x");
        let elsewhere = Device::emulator().stream().unwrap();
        kind(routed.combine(&elsewhere, rows, on_device.out.tensor_mut(&[10, 64]).unwrap()), "workspace");
        kind(routed.load(&elsewhere).map(drop), "workspace");

        let forward = MoeRouter::new(Config { backward: false, quantise: Some(E4M3), ..*router.config() }).unwrap();
        let mut memory = device.zeros::<u8>(forward.workspace_bytes() as usize).unwrap();
        let mut routed = forward.routed(memory.tensor_mut(&[forward.workspace_bytes()]).unwrap(), 10).unwrap();
        let needed = "backward of the configuration";
        kind(routed.backward_combine(&stream, rows, grad_out, room.tensor_mut(&[44, 64]).unwrap()), needed);
        kind(routed.backward_gate(&stream, None, room.tensor_mut(&[10, 8]).unwrap()), needed);
        kind(routed.grad_topk_weights().map(drop), needed);
        kind(routed.dispatch(&stream, x, Expanded::Plain(room.tensor_mut(&[44, 64]).unwrap())), "out");
        assert_eq!(results(&on_device).unwrap(), untouched);
    }
}
