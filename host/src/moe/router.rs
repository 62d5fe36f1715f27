//! [`MoeRouter`]: a routed layer without its experts, forward and backward, composed of this family's ops.

use super::get_fused_mapping::{self, MAX_EXPERTS, max_expanded_tokens};
use super::moe_topk_gate_backward::{self, AuxGrad, moe_topk_gate_backward};
use super::moe_topk_gate_forward::{self, ImageBias, moe_topk_gate_forward};
use super::reduce_fused_backward::{self, reduce_fused_backward};
use super::{expand_to_fused, reduce_fused};
use crate::quant::{Format, Input, Sf, SfLayout, SfMut, SfShape, per_token_cast, sf_shape};
use crate::{DType, Error, Result, Stream, TensorMut, TensorRef, View, check};

const OP: &str = "moe_router";

/// How tokens are quantised on their way to the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantise {
    /// What to.
    pub format: Format,
    /// Channels that share a scale: 16, 32, 64 or 128.
    pub num_per_channels: u32,
    /// Make every scale a power of two. Packed layouts need it.
    pub round_sf: bool,
    /// How the scales of the expanded buffer lie, one of [`SfLayout::COMMON`].
    pub layout: SfLayout,
}

/// What a [`MoeRouter`] is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Experts, 1 to 1024; the gate wants a multiple of 4.
    pub num_experts: u64,
    /// Experts of a token, at most `num_experts`; the gate takes up to 32.
    pub num_topk: u64,
    /// Channels of a token.
    pub hidden: u64,
    /// Type of tokens and expert outputs, bf16 or f32.
    pub dtype: DType,
    /// Most tokens of a batch.
    pub max_tokens: u64,
    /// Each expert's rows are a multiple of this, at least 1.
    pub alignment: u32,
    /// Rows of the expanded buffer that there is room for. `None` is the worst case, in which nothing is ever dropped. Choices whose
    /// row would lie beyond are **dropped**: they take no part, forward or backward, and [`Routed::load`] counts them. Experts with the
    /// highest numbers lose first.
    pub max_expanded_tokens: Option<u64>,
    /// What the gate multiplies the normalised weights by.
    pub routed_scaling_factor: f32,
    /// Experts get quantised rows. The backward pass takes that for the identity.
    pub quantise: Option<Quantise>,
    /// Keep what the backward pass needs.
    pub backward: bool,
}

/// A mixture-of-experts layer without its experts: gate, expanded buffer, experts (yours), sum; and all of it backward.
///
/// | step | reads | writes | made of |
/// |---|---|---|---|
/// | [`gate`](Routed::gate) | logits | routing table | [`moe_topk_gate_forward()`](super::moe_topk_gate_forward()) |
/// | [`dispatch`](Routed::dispatch) | tokens | expanded buffer | [`get_fused_mapping()`](super::get_fused_mapping()), [`per_token_cast()`](crate::quant::per_token_cast()), [`expand_to_fused()`](super::expand_to_fused()) |
/// | [`combine`](Routed::combine) | expert outputs | sum by token | [`reduce_fused()`](super::reduce_fused()) |
/// | [`backward_combine`](Routed::backward_combine) | gradient of the sum, expert outputs | their gradient | [`reduce_fused_backward()`](super::reduce_fused_backward()) |
/// | [`backward_dispatch`](Routed::backward_dispatch) | gradient of the expanded buffer | gradient of the tokens | [`reduce_fused()`](super::reduce_fused()) |
/// | [`backward_gate`](Routed::backward_gate) | | gradient of the logits | [`moe_topk_gate_backward()`](super::moe_topk_gate_backward()) |
///
/// It owns no memory: what the steps hand to each other lies in a workspace of the caller, the same one from the gate to its gradient.
/// Every step is asynchronous and allocates nothing; one step or all of them can be captured into a graph. All results are
/// deterministic. The mapping waits for no count, so the expanded buffer has a fixed number of rows,
/// [`num_expanded_tokens`](Self::num_expanded_tokens); those that no choice takes are zeros.
///
/// ```
/// use ferrotile::moe::router::{Config, Expanded, Gate, MoeRouter};
/// use ferrotile::{DType, Device};
///
/// let router = MoeRouter::new(Config {
///     num_experts: 4,
///     num_topk: 2,
///     hidden: 8,
///     dtype: DType::F32,
///     max_tokens: 3,
///     alignment: 2,
///     max_expanded_tokens: None,
///     routed_scaling_factor: 1.0,
///     quantise: None,
///     backward: false,
/// })?;
/// let device = Device::emulator();
/// let stream = device.stream()?;
/// let mut memory = device.zeros::<u8>(router.workspace_bytes() as usize)?;
/// let (logits, x) = (device.upload(&[0.5f32, -1.0, 2.0, 0.0])?, device.upload(&[1.0f32; 8])?);
/// let rows = router.num_expanded_tokens(1);
/// let (mut expanded, mut out) = (device.alloc::<f32>((rows * 8) as usize)?, device.alloc::<f32>(8)?);
///
/// let mut routed = router.routed(memory.tensor_mut(&[router.workspace_bytes()])?, 1)?;
/// routed.gate(&stream, Gate { logits: logits.tensor(&[1, 4])?, bias: None, image_bias: None, mask: None })?;
/// routed.dispatch(&stream, x.tensor(&[1, 8])?, Expanded::Plain(expanded.tensor_mut(&[rows, 8])?))?;
/// // The experts are the identity here.
/// routed.combine(&stream, expanded.tensor(&[rows, 8])?, out.tensor_mut(&[1, 8])?)?;
/// let load = routed.load(&stream)?;
/// assert_eq!(load.experts.iter().map(|e| e.rows).collect::<Vec<_>>(), [1, 0, 1, 0]);
/// // Weights add up to 1.
/// assert!(out.to_vec()?.iter().all(|y| (y - 1.0).abs() < 1e-6));
/// # Ok::<(), ferrotile::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeRouter {
    config: Config,
    /// Rows of the expanded buffer for [`Config::max_tokens`].
    rows: u64,
    /// Where each part of a workspace starts, whatever the batch, and where the last one ends.
    starts: [u64; Part::ALL.len() + 1],
}

/// What lies in a workspace, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// First, as it alone has to be zeroed, and to stay where it is.
    Mapping,
    TopkIdx,
    TopkWeights,
    TokenTopkToPos,
    PosToExpert,
    PosToToken,
    PosToTokenTopk,
    ExpertStart,
    ExpertEnd,
    NumTokensPerExpert,
    Quantised,
    QuantisedSf,
    Scores,
    GradTopkWeights,
}

impl Part {
    const ALL: [Self; 14] = [
        Self::Mapping,
        Self::TopkIdx,
        Self::TopkWeights,
        Self::TokenTopkToPos,
        Self::PosToExpert,
        Self::PosToToken,
        Self::PosToTokenTopk,
        Self::ExpertStart,
        Self::ExpertEnd,
        Self::NumTokensPerExpert,
        Self::Quantised,
        Self::QuantisedSf,
        Self::Scores,
        Self::GradTopkWeights,
    ];
}

/// Parts of a workspace start at multiples of this many bytes, as buffers do.
const PART_ALIGN: u64 = 256;

/// Most tokens, choices or rows: what fits i32.
const MOST: u64 = i32::MAX as u64;

impl MoeRouter {
    /// Checks the numbers. Allocates nothing.
    ///
    /// # Errors
    /// [`Error::Value`] for numbers out of range or more than 2^31 - 1 choices or rows in the worst case, [`Error::DType`].
    pub fn new(config: Config) -> Result<Self> {
        let Config { num_experts, num_topk, hidden, max_tokens, alignment, .. } = config;
        check::in_range(OP, "num_experts", num_experts, 1, MAX_EXPERTS)?;
        check::in_range(OP, "num_topk", num_topk, 1, num_experts)?;
        check::in_range(OP, "hidden", hidden, 1, MOST)?;
        check::in_range(OP, "max_tokens", max_tokens, 0, MOST / num_topk)?;
        let choices = max_tokens * num_topk;
        check::in_range(OP, "alignment", alignment.into(), 1, 1 + (MOST - choices) / num_experts)?;
        if !matches!(config.dtype, DType::Bf16 | DType::F32) {
            return Err(Error::DType { op: OP, arg: "dtype", allowed: "bf16, f32".to_owned(), got: config.dtype });
        }
        if !config.routed_scaling_factor.is_finite() {
            let got = config.routed_scaling_factor.to_string();
            return Err(Error::Value { op: OP, arg: "routed_scaling_factor", allowed: "finite numbers".to_owned(), got });
        }
        if let Some(quantise) = config.quantise {
            check::one_of(OP, "num_per_channels", quantise.num_per_channels, &[16, 32, 64, 128])?;
            check::one_of(OP, "layout", quantise.layout, SfLayout::COMMON)?;
            if quantise.layout.is_packed() {
                check::one_of(OP, "round_sf with a packed layout", quantise.round_sf, &[true])?;
            }
            check::divisible(OP, "hidden", hidden, if quantise.format == Format::E2m1 { 2 } else { 1 })?;
        }
        let worst = max_expanded_tokens(max_tokens, num_topk, num_experts, alignment);
        let rows = config.max_expanded_tokens.map_or(worst, |rows| rows.min(worst));
        let mut router = Self { config, rows, starts: [0; Part::ALL.len() + 1] };
        for (i, part) in Part::ALL.into_iter().enumerate() {
            let SfShape { dtype, elements, .. } = router.part(part, max_tokens, rows);
            router.starts[i + 1] = (router.starts[i] + elements * dtype.size()).next_multiple_of(PART_ALIGN);
        }
        Ok(router)
    }

    /// What it was made from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Rows of the expanded buffer for a batch: the worst case, or [`Config::max_expanded_tokens`] if that is less.
    pub fn num_expanded_tokens(&self, num_tokens: u64) -> u64 {
        let Config { num_topk, num_experts, alignment, .. } = self.config;
        max_expanded_tokens(num_tokens, num_topk, num_experts, alignment).min(self.rows)
    }

    /// Bytes of a workspace, for batches of up to [`Config::max_tokens`].
    pub fn workspace_bytes(&self) -> u64 {
        self.starts[Part::ALL.len()]
    }

    /// Type and shape of the expanded buffer's data for a batch.
    pub fn expanded_shape(&self, num_tokens: u64) -> (DType, [u64; 2]) {
        let Config { hidden, dtype, quantise, .. } = self.config;
        let (dtype, columns) = quantise.map_or((dtype, hidden), |q| (q.format.dtype(), q.format.columns(hidden)));
        (dtype, [self.num_expanded_tokens(num_tokens), columns])
    }

    /// What to allocate for the scale factors of the expanded buffer, if tokens are quantised.
    pub fn expanded_sf_shape(&self, num_tokens: u64) -> Option<SfShape> {
        let quantise = self.config.quantise?;
        Some(sf_shape(self.num_expanded_tokens(num_tokens), self.config.hidden, (1, quantise.num_per_channels), quantise.layout))
    }

    /// The steps of one batch of `num_tokens` tokens. `memory` is u8 `[n]`, contiguous, with `n` at least
    /// [`workspace_bytes`](Self::workspace_bytes) and 256-byte aligned. It is zeroed once, when it is made
    /// (`device.zeros::<u8>(bytes)`), and may then be used for one batch after the other, of whatever size; what a step has left there is
    /// found by the next one, also through another call of this function. Batches that are under way at the same time need one each.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Layout`] of `workspace`; [`Error::Value`] for more tokens than were planned for.
    pub fn routed<'a>(&self, memory: TensorMut<'a>, num_tokens: u64) -> Result<Routed<'a>> {
        check::in_range(OP, "num_tokens", num_tokens, 0, self.config.max_tokens)?;
        check::rank(OP, "workspace", &memory, 1)?;
        check::dtype(OP, "workspace", &memory, &[DType::U8])?;
        check::contiguous(OP, "workspace", &memory)?;
        check::aligned(OP, "workspace", &memory, PART_ALIGN)?;
        let bytes = self.workspace_bytes();
        if memory.dim(0) < bytes {
            let (expected, got) = (format!("at least [{bytes}]"), format!("{:?}", memory.shape()));
            return Err(Error::Shape { op: OP, arg: "workspace", expected, got });
        }
        Ok(Routed { router: *self, memory, t: num_tokens, p: self.num_expanded_tokens(num_tokens) })
    }

    /// Type, shape and strides of a part for `t` tokens and `p` rows.
    fn part(&self, part: Part, t: u64, p: u64) -> SfShape {
        let Config { num_experts: e, num_topk: k, hidden, backward, quantise, .. } = self.config;
        let dense = |dtype, shape: [u64; 2]| SfShape { dtype, shape, strides: [shape[1], 1], elements: shape[0] * shape[1] };
        let kept = if backward { t } else { 0 };
        match part {
            Part::Mapping => dense(DType::U8, [1, get_fused_mapping::workspace_bytes(t, k, e)]),
            Part::TopkIdx => dense(DType::I64, [t, k]),
            Part::TopkWeights => dense(DType::F32, [t, k]),
            Part::TokenTopkToPos => dense(DType::I32, [t, k]),
            Part::PosToExpert | Part::PosToToken | Part::PosToTokenTopk => dense(DType::I32, [1, p]),
            Part::ExpertStart | Part::ExpertEnd | Part::NumTokensPerExpert => dense(DType::I32, [1, e]),
            Part::Quantised => {
                quantise.map_or(dense(DType::U8, [0, 0]), |q| dense(q.format.dtype(), [t, q.format.columns(hidden)]))
            }
            Part::QuantisedSf => {
                quantise.map_or(dense(DType::U8, [0, 0]), |q| sf_shape(t, hidden, (1, q.num_per_channels), row_layout(q.layout)))
            }
            Part::Scores => dense(DType::F32, [kept, e]),
            Part::GradTopkWeights => dense(DType::F32, [kept, k]),
        }
    }
}

/// How the scales of tokens lie before they are expanded.
fn row_layout(layout: SfLayout) -> SfLayout {
    if layout.is_packed() { SfLayout::RowMajorPacked } else { SfLayout::RowMajor }
}

/// What the gate reads. See [`moe_topk_gate_forward::Args`] for each.
#[derive(Clone, Copy, Debug)]
pub struct Gate<'a> {
    /// f32 `[num_tokens, num_experts]`.
    pub logits: TensorRef<'a>,
    /// f32 `[num_experts]`, for the ranking only.
    pub bias: Option<TensorRef<'a>>,
    /// What some tokens rank by instead.
    pub image_bias: Option<ImageBias<'a>>,
    /// u8 `[num_tokens]`; 0 is a token that goes to no expert.
    pub mask: Option<TensorRef<'a>>,
}

/// The expanded buffer, which the experts read.
#[derive(Debug)]
pub enum Expanded<'a> {
    /// `[num_expanded_tokens, hidden]` of the type of the tokens.
    Plain(TensorMut<'a>),
    /// Quantised, as [`Config::quantise`] says.
    Quantised {
        /// e4m3 `[num_expanded_tokens, hidden]` or e2m1x2 `[num_expanded_tokens, hidden / 2]`.
        data: TensorMut<'a>,
        /// Its scale factors, of [`MoeRouter::expanded_sf_shape`].
        sf: SfMut<'a>,
    },
}

/// The routing table of a batch for those who fill it themselves, for instance with another gate.
#[derive(Debug)]
pub struct RoutingMut<'a> {
    /// Expert of each choice, -1 for none: i64 `[num_tokens, num_topk]`.
    pub topk_idx: TensorMut<'a>,
    /// Weight of each choice: f32 `[num_tokens, num_topk]`.
    pub topk_weights: TensorMut<'a>,
}

/// What became of the choices of one expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertLoad {
    /// Choices that have a row.
    pub rows: u64,
    /// Choices that were dropped, see [`Config::max_expanded_tokens`].
    pub dropped: u64,
    /// Rows that make the others a multiple of the alignment, as far as there is room.
    pub padding: u64,
}

/// What became of all choices, from [`Routed::load`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// By expert.
    pub experts: Vec<ExpertLoad>,
    /// Rows of the expanded buffer.
    pub num_expanded_tokens: u64,
    /// Rows that would have been enough, and not more than that.
    pub needed: u64,
}

impl Load {
    /// Choices that were dropped.
    pub fn dropped(&self) -> u64 {
        self.experts.iter().map(|expert| expert.dropped).sum()
    }

    /// Choices that have a row.
    pub fn rows(&self) -> u64 {
        self.experts.iter().map(|expert| expert.rows).sum()
    }
}

/// The steps of one batch, on a workspace. From [`MoeRouter::routed`].
///
/// A step that returns an error has not touched the caller's outputs; what lies in the workspace then is no routing.
#[derive(Debug)]
pub struct Routed<'a> {
    router: MoeRouter,
    memory: TensorMut<'a>,
    t: u64,
    p: u64,
}

impl Routed<'_> {
    /// Tokens of the batch.
    pub fn num_tokens(&self) -> u64 {
        self.t
    }

    /// Rows of the expanded buffer.
    pub fn num_expanded_tokens(&self) -> u64 {
        self.p
    }

    /// Expert of each choice: i64 `[num_tokens, num_topk]`.
    ///
    /// # Errors
    /// None in practice; as for any view.
    pub fn topk_idx(&self) -> Result<TensorRef<'_>> {
        self.input(Part::TopkIdx)
    }

    /// Weight of each choice: f32 `[num_tokens, num_topk]`.
    ///
    /// # Errors
    /// As for [`topk_idx`](Self::topk_idx).
    pub fn topk_weights(&self) -> Result<TensorRef<'_>> {
        self.input(Part::TopkWeights)
    }

    /// Gradient of the weights, after [`backward_combine`](Self::backward_combine): f32 `[num_tokens, num_topk]`.
    ///
    /// # Errors
    /// [`Error::Value`] if the router was not made for that.
    pub fn grad_topk_weights(&self) -> Result<TensorRef<'_>> {
        self.check_backward()?;
        self.input(Part::GradTopkWeights)
    }

    /// Row of each choice, -1 for none: i32 `[num_tokens, num_topk]`.
    ///
    /// # Errors
    /// As for [`topk_idx`](Self::topk_idx).
    pub fn token_topk_to_pos(&self) -> Result<TensorRef<'_>> {
        self.input(Part::TokenTopkToPos)
    }

    /// Expert of each row, -1 for padding: i32 `[num_expanded_tokens]`. What grouped matrix products take.
    ///
    /// # Errors
    /// As for [`topk_idx`](Self::topk_idx).
    pub fn pos_to_expert(&self) -> Result<TensorRef<'_>> {
        self.input(Part::PosToExpert)
    }

    /// Token of each row, -1 for padding: i32 `[num_expanded_tokens]`.
    ///
    /// # Errors
    /// As for [`topk_idx`](Self::topk_idx).
    pub fn pos_to_token(&self) -> Result<TensorRef<'_>> {
        self.input(Part::PosToToken)
    }

    /// First row of each expert: i32 `[num_experts]`.
    ///
    /// # Errors
    /// As for [`topk_idx`](Self::topk_idx).
    pub fn expert_start(&self) -> Result<TensorRef<'_>> {
        self.input(Part::ExpertStart)
    }

    /// Row after the last one of each expert, padding included: i32 `[num_experts]`. With too little room it may lie beyond it.
    ///
    /// # Errors
    /// As for [`topk_idx`](Self::topk_idx).
    pub fn expert_end(&self) -> Result<TensorRef<'_>> {
        self.input(Part::ExpertEnd)
    }

    /// The routing table, to be written instead of calling [`gate`](Self::gate). There is no [`backward_gate`](Self::backward_gate) then,
    /// but [`grad_topk_weights`](Self::grad_topk_weights).
    ///
    /// # Errors
    /// As for [`topk_idx`](Self::topk_idx).
    pub fn routing_mut(&mut self) -> Result<RoutingMut<'_>> {
        Ok(RoutingMut { topk_idx: self.output(Part::TopkIdx)?, topk_weights: self.output(Part::TopkWeights)? })
    }

    /// Chooses experts and weights: [`moe_topk_gate_forward()`](super::moe_topk_gate_forward()), without shared experts, replicas and
    /// random routing.
    ///
    /// # Errors
    /// Those of the op.
    pub fn gate(&mut self, stream: &Stream, gate: Gate<'_>) -> Result<()> {
        let config = self.router.config;
        let Gate { logits, bias, image_bias, mask } = gate;
        check::shape(OP, "logits", &logits, &[self.t, config.num_experts])?;
        moe_topk_gate_forward(
            stream,
            moe_topk_gate_forward::Args {
                logits,
                bias,
                image_bias,
                mask,
                force_random: None,
                fix_routing_mask: None,
                physical_map: None,
                num_shared_experts: 0,
                routed_scaling_factor: config.routed_scaling_factor,
                ep_rank: 0,
                unmapped_topk_idx: None,
                scores: if config.backward { Some(self.output(Part::Scores)?) } else { None },
                topk_idx: self.output(Part::TopkIdx)?,
                topk_weights: self.output(Part::TopkWeights)?,
            },
        )
    }

    /// Lays out the expanded buffer and fills it with the rows of `x`, `[num_tokens, hidden]` of [`Config::dtype`], quantised if the router
    /// was made for that. Rows may lie any distance apart.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Layout`], [`Error::Value`] if `out` is not of the kind that the router was made
    /// for, and those of the ops.
    pub fn dispatch(&mut self, stream: &Stream, x: TensorRef<'_>, out: Expanded<'_>) -> Result<()> {
        let config = self.router.config;
        self.check_tensor(stream, "x", &x, config.dtype, [self.t, config.hidden], false)?;
        let (dtype, shape) = self.router.expanded_shape(self.t);
        let kind = |quantised: bool| if quantised { "quantised" } else { "plain" };
        let (data, quantised) = match &out {
            Expanded::Plain(data) => (data, false),
            Expanded::Quantised { data, .. } => (data, true),
        };
        if config.quantise.is_some() != quantised {
            let (allowed, got) = (kind(!quantised).to_owned(), kind(quantised).to_owned());
            return Err(Error::Value { op: OP, arg: "out", allowed, got });
        }
        self.check_tensor(stream, "out", data, dtype, shape, true)?;
        if let (Expanded::Quantised { sf, .. }, Some(quantise)) = (&out, config.quantise) {
            check::one_of(OP, "layout of out_sf", sf.layout, &[quantise.layout])?;
            let columns = config.hidden.div_ceil(quantise.num_per_channels.into());
            sf.check(OP, "out_sf", SfLayout::COMMON, (self.p, columns))?;
            check::on_device(OP, stream.device(), "out_sf", sf.tensor.device())?;
        }
        // What may be wrong now is that tensors overlap, which the ops see before they write to them.
        let (memory, arg) = (("workspace", &*self.memory), if quantised { "out_sf" } else { "out" });
        let sf: &View = match &out {
            Expanded::Plain(data) => data,
            Expanded::Quantised { sf, .. } => &sf.tensor,
        };
        check::no_overlaps(OP, &[("x", &x), memory], &[("out", data)])?;
        check::no_overlaps(OP, &[("x", &x), memory], &[(arg, sf)])?;
        check::no_overlap(OP, ("x", &x), memory)?;

        get_fused_mapping::get_fused_mapping(
            stream,
            get_fused_mapping::Args {
                topk_idx: self.input(Part::TopkIdx)?,
                alignment: config.alignment,
                pos_to_expert: self.output(Part::PosToExpert)?,
                pos_to_token: self.output(Part::PosToToken)?,
                pos_to_token_topk: self.output(Part::PosToTokenTopk)?,
                token_topk_to_pos: self.output(Part::TokenTopkToPos)?,
                expert_start: self.output(Part::ExpertStart)?,
                expert_end: self.output(Part::ExpertEnd)?,
                num_tokens_per_expert: self.output(Part::NumTokensPerExpert)?,
                workspace: self.output(Part::Mapping)?,
            },
        )?;
        let (token_topk_to_pos, pos_to_expert) = (self.token_topk_to_pos()?, self.pos_to_expert()?);
        match (out, config.quantise) {
            (Expanded::Quantised { data: out, sf: out_sf }, Some(Quantise { num_per_channels, round_sf, layout, .. })) => {
                let layout = row_layout(layout);
                per_token_cast::per_token_cast(
                    stream,
                    per_token_cast::Args {
                        x: Input::Plain(x),
                        npc: num_per_channels,
                        round_sf,
                        stochastic: false,
                        out: self.output(Part::Quantised)?,
                        sf: SfMut { tensor: self.output(Part::QuantisedSf)?, layout },
                    },
                )?;
                expand_to_fused::expand_to_fused_with_sf(
                    stream,
                    expand_to_fused::WithSfArgs {
                        x: self.input(Part::Quantised)?,
                        x_sf: Sf { tensor: self.input(Part::QuantisedSf)?, layout },
                        num_per_channels,
                        token_topk_to_pos,
                        pos_to_expert,
                        pos_to_token: Some(self.pos_to_token()?),
                        out,
                        out_sf,
                    },
                )
            }
            (Expanded::Plain(out) | Expanded::Quantised { data: out, .. }, _) => {
                expand_to_fused::expand_to_fused(stream, expand_to_fused::Args { x, token_topk_to_pos, pos_to_expert, out })
            }
        }
    }

    /// Adds up the rows of `expert_out`, `[num_expanded_tokens, hidden]`, that belong to each token, with the weights of the gate, into
    /// `out`, `[num_tokens, hidden]`, contiguous. Both are of [`Config::dtype`].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Layout`], and those of the op.
    pub fn combine(&mut self, stream: &Stream, expert_out: TensorRef<'_>, out: TensorMut<'_>) -> Result<()> {
        let Config { dtype, hidden, .. } = self.router.config;
        self.check_tensor(stream, "expert_out", &expert_out, dtype, [self.p, hidden], false)?;
        self.check_tensor(stream, "out", &out, dtype, [self.t, hidden], true)?;
        self.reduce(stream, expert_out, Some(self.topk_weights()?), out)
    }

    /// The gradient of [`combine`](Self::combine): from `grad_out`, `[num_tokens, hidden]`, and the expert outputs to
    /// `grad_expert_out`, `[num_expanded_tokens, hidden]`, contiguous, and to the gradient of the weights in the workspace. All are of
    /// [`Config::dtype`]. Rows that no choice takes become zeros, choices without a row have the gradient 0.
    ///
    /// # Errors
    /// [`Error::Value`] if the router was not made for that; [`Error::Shape`], [`Error::DType`], [`Error::Layout`], and those of the op.
    pub fn backward_combine(
        &mut self,
        stream: &Stream,
        expert_out: TensorRef<'_>,
        grad_out: TensorRef<'_>,
        grad_expert_out: TensorMut<'_>,
    ) -> Result<()> {
        self.check_backward()?;
        let Config { dtype, hidden, .. } = self.router.config;
        self.check_tensor(stream, "expert_out", &expert_out, dtype, [self.p, hidden], false)?;
        self.check_tensor(stream, "grad_out", &grad_out, dtype, [self.t, hidden], false)?;
        self.check_tensor(stream, "grad_expert_out", &grad_expert_out, dtype, [self.p, hidden], true)?;
        reduce_fused_backward(
            stream,
            reduce_fused_backward::Args {
                x: expert_out,
                grad_out,
                topk_weights: Some(self.topk_weights()?),
                token_topk_to_pos: self.token_topk_to_pos()?,
                pos_to_expert: self.pos_to_expert()?,
                grad_x: grad_expert_out,
                grad_topk_weights: self.output(Part::GradTopkWeights)?,
            },
        )
    }

    /// The gradient of [`dispatch`](Self::dispatch): adds up the rows of `grad_expanded`, `[num_expanded_tokens, hidden]`, that belong to
    /// each token, into `grad_x`, `[num_tokens, hidden]`, contiguous. Both are of [`Config::dtype`].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Layout`], and those of the op.
    pub fn backward_dispatch(&mut self, stream: &Stream, grad_expanded: TensorRef<'_>, grad_x: TensorMut<'_>) -> Result<()> {
        let Config { dtype, hidden, .. } = self.router.config;
        self.check_tensor(stream, "grad_expanded", &grad_expanded, dtype, [self.p, hidden], false)?;
        self.check_tensor(stream, "grad_x", &grad_x, dtype, [self.t, hidden], true)?;
        self.reduce(stream, grad_expanded, None, grad_x)
    }

    /// The gradient of [`gate`](Self::gate), from that of the weights, which [`backward_combine`](Self::backward_combine) left, into
    /// `grad_logits`, f32 `[num_tokens, num_experts]`. `aux` is that of a balancing loss.
    ///
    /// # Errors
    /// [`Error::Value`] if the router was not made for that; those of [`moe_topk_gate_backward()`](super::moe_topk_gate_backward()).
    pub fn backward_gate(&mut self, stream: &Stream, aux: Option<AuxGrad<'_>>, grad_logits: TensorMut<'_>) -> Result<()> {
        self.check_backward()?;
        moe_topk_gate_backward(
            stream,
            moe_topk_gate_backward::Args {
                scores: self.input(Part::Scores)?,
                topk_idx: self.topk_idx()?,
                topk_weights: self.topk_weights()?,
                grad_topk_weights: self.input(Part::GradTopkWeights)?,
                routed_scaling_factor: self.router.config.routed_scaling_factor,
                aux,
                grad_logits,
            },
        )
    }

    /// What became of the choices, after [`dispatch`](Self::dispatch). For reports: **waits for the stream**, copies the routing table
    /// to the host and counts there.
    ///
    /// # Errors
    /// [`Error::Unsupported`] while the stream is captured, [`Error::DeviceMismatch`], [`Error::Driver`].
    pub fn load(&self, stream: &Stream) -> Result<Load> {
        check::on_device(OP, stream.device(), "workspace", self.memory.device())?;
        stream.refuse_capture(OP)?;
        let experts = stream.download::<i64>(OP, &*self.topk_idx()?)?;
        let rows = stream.download::<i32>(OP, &*self.token_topk_to_pos()?)?;
        let lengths = stream.download::<i32>(OP, &*self.input(Part::NumTokensPerExpert)?)?;
        let mut load = Load { experts: Vec::new(), num_expanded_tokens: self.p, needed: 0 };
        load.experts.resize(self.router.config.num_experts as usize, ExpertLoad::default());
        for (expert, row) in experts.into_iter().zip(rows) {
            let Some(of_expert) = usize::try_from(expert).ok().and_then(|expert| load.experts.get_mut(expert)) else { continue };
            *(if row >= 0 { &mut of_expert.rows } else { &mut of_expert.dropped }) += 1;
        }
        for (expert, length) in load.experts.iter_mut().zip(lengths) {
            let start = load.needed;
            load.needed += length as u64;
            expert.padding = (load.needed.min(self.p)).saturating_sub(start.min(self.p)).saturating_sub(expert.rows);
        }
        Ok(load)
    }

    fn reduce(&self, stream: &Stream, x: TensorRef<'_>, topk_weights: Option<TensorRef<'_>>, out: TensorMut<'_>) -> Result<()> {
        let token_topk_to_pos = self.token_topk_to_pos()?;
        reduce_fused::reduce_fused(stream, reduce_fused::Args { x, x_sf: None, topk_weights, token_topk_to_pos, sf: None, out })
    }

    fn check_backward(&self) -> Result<()> {
        check::one_of(OP, "backward of the configuration", self.router.config.backward, &[true])
    }

    /// A tensor of the caller is what the ops will take for sure, before the first of them runs.
    fn check_tensor(
        &self,
        stream: &Stream,
        arg: &'static str,
        tensor: &View,
        dtype: DType,
        shape: [u64; 2],
        whole: bool,
    ) -> Result<()> {
        check::dtype(OP, arg, tensor, &[dtype])?;
        check::shape(OP, arg, tensor, &shape)?;
        if whole { check::contiguous(OP, arg, tensor) } else { check::last_stride_1(OP, arg, tensor) }?;
        check::aligned(OP, arg, tensor, dtype.size())?;
        check::on_device(OP, stream.device(), "workspace", self.memory.device())?;
        check::on_device(OP, stream.device(), arg, tensor.device())
    }

    fn view(&self, part: Part) -> Result<View> {
        let SfShape { dtype, shape, strides, .. } = self.router.part(part, self.t, self.p);
        let ptr = self.memory.ptr() + self.router.starts[part as usize];
        let flat = !matches!(
            part,
            Part::TopkIdx
                | Part::TopkWeights
                | Part::TokenTopkToPos
                | Part::Quantised
                | Part::QuantisedSf
                | Part::Scores
                | Part::GradTopkWeights
        );
        let first = usize::from(flat);
        View::new(OP, *self.memory.device(), ptr, dtype, &shape[first..], &strides[first..])
    }

    fn input(&self, part: Part) -> Result<TensorRef<'_>> {
        Ok(TensorRef::new(self.view(part)?))
    }

    /// To be written through a shared borrow, as an op takes several parts at once: they lie apart, and the steps, which call this,
    /// borrow the workspace exclusively.
    fn output(&self, part: Part) -> Result<TensorMut<'_>> {
        Ok(TensorMut::of_own(self.view(part)?))
    }
}
