//! The layer: one batch, forward and backward. A module of its own, so that the tests (`tests/moe_layer.rs`) run it too.

pub mod cli;
pub mod experts;
pub mod reference;
#[path = "../../shared/mod.rs"]
mod shared;
mod table;

use experts::Experts;
use ferrotile::moe::router::{Config, Expanded, Gate, Load, MoeRouter, Quantise};
use ferrotile::quant::{Format, QuantSpec, QuantTensor, SfLayout};
use ferrotile::{DType, Device, Event, Stream};
use indicatif::ProgressBar;
use shared::Random;
use std::time::Instant;

/// What there is to do.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Tokens of the batch.
    pub tokens: u64,
    /// Channels of a token.
    pub hidden: u64,
    /// Channels in the middle of an expert.
    pub intermediate: u64,
    /// Experts.
    pub experts: u64,
    /// Experts of a token.
    pub topk: u64,
    /// Each expert's rows are a multiple of this.
    pub alignment: u32,
    /// Rows of the expanded buffer; the worst case without.
    pub rows: Option<u64>,
    /// Experts get e4m3 with a scale for each 32 channels.
    pub quantise: bool,
    /// Seed of tokens and weights.
    pub seed: u64,
}

/// Channels that share a scale factor.
pub const NUM_PER_CHANNELS: u32 = 32;
/// What the gate multiplies the weights by.
pub const FACTOR: f32 = 1.5;

/// Why there is no result, or not the right one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device, or a launch that the library refused.
    #[error(transparent)]
    Device(#[from] ferrotile::Error),
    /// The layer and the reference differ.
    #[error("{what} is off by {error:.1e} of its largest value, more than {bound:.0e}")]
    Far {
        /// Which result.
        what: &'static str,
        /// The largest difference by the largest value.
        error: f64,
        /// What would have been fine.
        bound: f64,
    },
}

/// Result of everything in this program.
pub type Result<T> = std::result::Result<T, Error>;

/// Stages of the layer, and how long each took in microseconds.
pub type Stages = Vec<(&'static str, f64)>;

/// What came of it.
pub struct Report {
    /// What became of the choices.
    pub load: Load,
    /// What took how long.
    pub stages: Stages,
    /// Each result's largest difference from the reference, by the largest value.
    pub errors: Vec<(&'static str, f64)>,
}

/// Sums of a few thousand f32 products against f64, by the largest value of the tensor.
pub const BOUND: f64 = 1e-5;

impl Report {
    /// An error if a result is not that of the reference.
    pub fn check(&self) -> Result<()> {
        match self.errors.iter().find(|(_, error)| error.is_nan() || *error > BOUND) {
            Some(&(what, error)) => Err(Error::Far { what, error, bound: BOUND }),
            None => Ok(()),
        }
    }
}

/// What the layer is given: weights, tokens, and the gradient of a loss with respect to what comes out.
pub struct Problem {
    /// The numbers.
    pub options: Options,
    /// `[experts, hidden]`: logits are its product with the tokens.
    pub gate: Vec<f32>,
    /// The experts.
    pub experts: Experts,
    /// `[tokens, hidden]`.
    pub x: Vec<f32>,
    /// `[tokens, hidden]`.
    pub grad_out: Vec<f32>,
}

impl Problem {
    /// Random numbers.
    pub fn new(options: Options) -> Self {
        let mut random = Random(options.seed);
        let Options { tokens, hidden, intermediate, experts, .. } = options;
        let mut normals = |len: u64, scale: f64| -> Vec<f32> { (0..len).map(|_| (scale * random.normal()) as f32).collect() };
        let scale = |inputs: u64| 1.0 / (inputs.max(1) as f64).sqrt();
        Self {
            options,
            gate: normals(experts * hidden, scale(hidden)),
            experts: Experts {
                hidden: hidden as usize,
                intermediate: intermediate as usize,
                up: normals(experts * intermediate * hidden, scale(hidden)),
                down: normals(experts * hidden * intermediate, scale(intermediate)),
            },
            x: normals(tokens * hidden, 1.0),
            grad_out: normals(tokens * hidden, 1.0),
        }
    }

    /// The gate's matrix product, `[tokens, experts]`, on the CPU like those of the experts.
    pub fn logits(&self) -> Vec<f32> {
        let hidden = self.options.hidden as usize;
        let row = |x: &[f32]| self.gate.chunks(hidden).map(|w| experts::dot(w, x)).collect::<Vec<_>>();
        self.x.chunks(hidden).flat_map(row).collect()
    }
}

impl Random {
    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        let (radius, angle) = ((-2.0 * self.uniform().ln()).sqrt(), std::f64::consts::TAU * self.uniform());
        radius * angle.cos()
    }
}

/// How long each stage took.
struct Clock<'a> {
    stream: &'a Stream,
    start: Event,
    end: Event,
    stages: Stages,
}

impl Clock<'_> {
    /// A stage on the device, by its own clock.
    fn device(&mut self, name: &'static str, work: impl FnOnce() -> ferrotile::Result<()>) -> ferrotile::Result<()> {
        self.start.record(self.stream)?;
        work()?;
        self.end.record(self.stream)?;
        self.stages.push((name, self.end.elapsed_us_since(&self.start)?));
        Ok(())
    }

    /// A stage on the CPU.
    fn host<T>(&mut self, name: &'static str, work: impl FnOnce() -> ferrotile::Result<T>) -> ferrotile::Result<T> {
        let start = Instant::now();
        let result = work()?;
        self.stages.push((name, start.elapsed().as_secs_f64() * 1e6));
        Ok(result)
    }
}

/// What the layer gives.
pub struct Outcome {
    /// Expert of each choice.
    pub topk_idx: Vec<i64>,
    /// `[tokens, hidden]`.
    pub out: Vec<f32>,
    /// `[tokens, hidden]`, through the experts and through the gate.
    pub grad_x: Vec<f32>,
    /// `[tokens, experts]`.
    pub grad_logits: Vec<f32>,
}

/// Run the layer on a device, forward and backward, and compare it with the reference.
pub fn run(options: &Options, device: &Device, progress: &ProgressBar) -> Result<Report> {
    let problem = Problem::new(*options);
    let router = router(options)?;
    // Rows go through the experts twice, forward and backward; tokens through all of them in the reference.
    progress.set_length(2 * 2 * router.num_expanded_tokens(options.tokens) + options.tokens * options.experts);
    // The first time compiles the kernels, the second one counts.
    forward_and_backward(&problem, &router, device, progress)?;
    let (outcome, load, stages) = forward_and_backward(&problem, &router, device, progress)?;
    progress.set_message("reference");
    let errors = reference::compare(&problem, &router, &outcome, progress);
    Ok(Report { load, stages, errors })
}

fn router(options: &Options) -> Result<MoeRouter> {
    let quantise =
        Quantise { format: Format::E4m3, num_per_channels: NUM_PER_CHANNELS, round_sf: false, layout: SfLayout::RowMajor };
    Ok(MoeRouter::new(Config {
        num_experts: options.experts,
        num_topk: options.topk,
        hidden: options.hidden,
        dtype: DType::F32,
        max_tokens: options.tokens,
        alignment: options.alignment,
        max_expanded_tokens: options.rows,
        routed_scaling_factor: FACTOR,
        quantise: options.quantise.then_some(quantise),
        backward: true,
    })?)
}

/// One step of training, up to the gradients.
fn forward_and_backward(
    problem: &Problem,
    router: &MoeRouter,
    device: &Device,
    progress: &ProgressBar,
) -> Result<(Outcome, Load, Stages)> {
    let Options { tokens: t, hidden: h, experts: e, topk: k, .. } = problem.options;
    let rows = router.num_expanded_tokens(t);
    let stream = device.stream()?;
    let mut clock = Clock { stream: &stream, start: Event::new(device)?, end: Event::new(device)?, stages: Vec::new() };
    let alloc = |len: u64| device.alloc::<f32>(len as usize);

    // The device's memory, all of it allocated once in a program that trains.
    let mut memory = device.zeros::<u8>(router.workspace_bytes() as usize)?;
    let (x, grad_out) = (device.upload(&problem.x)?, device.upload(&problem.grad_out)?);
    let (mut out, mut grad_x, mut grad_logits) = (alloc(t * h)?, alloc(t * h)?, alloc(t * e)?);
    let (mut expanded, mut expert_out, mut grad_expert_out) = (alloc(rows * h)?, alloc(rows * h)?, alloc(rows * h)?);
    let mut grad_expanded = alloc(rows * h)?;
    let spec =
        QuantSpec { format: ferrotile::quant::QuantFormat::E4m3, block: (1, NUM_PER_CHANNELS), layout: SfLayout::RowMajor };
    let mut quantised = QuantTensor::alloc(device, spec, if problem.options.quantise { rows } else { 0 }, h)?;
    let mut pos_to_expert = device.alloc::<i32>(rows as usize)?;
    let mut topk_idx = device.alloc::<i64>((t * k) as usize)?;

    // Forward.
    progress.set_message("forward");
    let logits = clock.host("logits (CPU)", || device.upload(&problem.logits()))?;
    let mut routed = router.routed(memory.tensor_mut(&[router.workspace_bytes()])?, t)?;
    clock.device("gate", || {
        routed.gate(&stream, Gate { logits: logits.tensor(&[t, e])?, bias: None, image_bias: None, mask: None })
    })?;
    clock.device("dispatch", || {
        let out = if problem.options.quantise {
            let (data, sf) = quantised.view_mut().into_parts();
            Expanded::Quantised { data, sf }
        } else {
            Expanded::Plain(expanded.tensor_mut(&[rows, h])?)
        };
        routed.dispatch(&stream, x.tensor(&[t, h])?, out)
    })?;
    stream.copy(&mut pos_to_expert.tensor_mut(&[rows])?, &routed.pos_to_expert()?)?;
    let of_rows = pos_to_expert.to_vec()?;
    let inputs = clock.host("experts (CPU)", || {
        let inputs = if problem.options.quantise { quantised.to_f32_vec()? } else { expanded.to_vec()? };
        expert_out.copy_from(&problem.experts.forward(&inputs, &of_rows, progress))?;
        Ok(inputs)
    })?;
    clock.device("combine", || routed.combine(&stream, expert_out.tensor(&[rows, h])?, out.tensor_mut(&[t, h])?))?;

    // Backward.
    progress.set_message("backward");
    clock.device("backward combine", || {
        let (expert_out, grad_out) = (expert_out.tensor(&[rows, h])?, grad_out.tensor(&[t, h])?);
        routed.backward_combine(&stream, expert_out, grad_out, grad_expert_out.tensor_mut(&[rows, h])?)
    })?;
    clock.host("backward experts (CPU)", || {
        let grads = problem.experts.backward(&inputs, &grad_expert_out.to_vec()?, &of_rows, progress);
        grad_expanded.copy_from(&grads)
    })?;
    clock.device("backward dispatch", || {
        routed.backward_dispatch(&stream, grad_expanded.tensor(&[rows, h])?, grad_x.tensor_mut(&[t, h])?)
    })?;
    clock.device("backward gate", || routed.backward_gate(&stream, None, grad_logits.tensor_mut(&[t, e])?))?;

    let load = routed.load(&stream)?;
    stream.copy(&mut topk_idx.tensor_mut(&[t, k])?, &routed.topk_idx()?)?;
    let (mut grad_x, grad_logits) = (grad_x.to_vec()?, grad_logits.to_vec()?);
    clock.host("backward logits (CPU)", || {
        for (grad_x, grad) in grad_x.chunks_mut(h as usize).zip(grad_logits.chunks(e as usize)) {
            grad.iter().zip(problem.gate.chunks(h as usize)).for_each(|(grad, gate)| experts::add_scaled(grad_x, *grad, gate));
        }
        Ok(())
    })?;
    let outcome = Outcome { topk_idx: topk_idx.to_vec()?, out: out.to_vec()?, grad_x, grad_logits };
    Ok((outcome, load, clock.stages))
}
