//! The same layer without routing, in f64: every token through every expert, one loop inside the other.

use super::{FACTOR, NUM_PER_CHANNELS, Options, Outcome, Problem};
use ferrotile::E4m3;
use ferrotile::moe::MoeRouter;
use indicatif::ProgressBar;
use rayon::prelude::*;

/// What one token gives.
struct Token {
    out: Vec<f64>,
    grad_x: Vec<f64>,
    grad_logits: Vec<f64>,
    /// By how much an expert that was not chosen has a better score than one that was.
    mischosen: f64,
}

/// Scores that differ by less may be ranked either way in f32.
const CLOSE: f64 = 1e-6;

/// The largest difference of each result from the dense layer, by the largest value.
pub fn compare(problem: &Problem, router: &MoeRouter, outcome: &Outcome, progress: &ProgressBar) -> Vec<(&'static str, f64)> {
    let Options { tokens, experts, topk, hidden, .. } = problem.options;
    let dropped = dropped(&outcome.topk_idx, router, tokens);
    let logits = problem.logits();
    let (e, k, h) = (experts as usize, topk as usize, hidden as usize);
    let token = |t: usize| {
        let chosen: Vec<usize> = outcome.topk_idx[t * k..][..k].iter().map(|expert| *expert as usize).collect();
        let token = dense(
            problem,
            &problem.x[t * h..][..h],
            &problem.grad_out[t * h..][..h],
            &logits[t * e..][..e],
            &chosen,
            &dropped[t * k..][..k],
        );
        progress.inc(experts);
        token
    };
    let all: Vec<Token> = (0..tokens as usize).into_par_iter().map(token).collect();

    let largest = |got: &[f32], of: fn(&Token) -> &[f64]| {
        let expected: Vec<f64> = all.iter().flat_map(|token| of(token).iter().copied()).collect();
        let size = expected.iter().fold(0.0f64, |size, v| size.max(v.abs()));
        // NaN is far from everything.
        let far = |(got, expected): (&f32, &f64)| (f64::from(*got) - expected).abs();
        let most =
            got.iter().zip(&expected).map(far).fold(0.0, |most: f64, far| if far > most || far.is_nan() { far } else { most });
        if expected.len() != got.len() {
            f64::NAN
        } else if size == 0.0 {
            most
        } else {
            most / size
        }
    };
    let mischosen = all.iter().map(|token| token.mischosen).fold(0.0, f64::max);
    vec![
        ("choice of experts", if mischosen > CLOSE { mischosen } else { 0.0 }),
        ("out", largest(&outcome.out, |token| &token.out)),
        ("grad of x", largest(&outcome.grad_x, |token| &token.grad_x)),
        ("grad of logits", largest(&outcome.grad_logits, |token| &token.grad_logits)),
    ]
}

/// Which choices find no room, by the rule of the documentation: experts in ascending order, each from a multiple of the alignment on,
/// its choices in order.
fn dropped(topk_idx: &[i64], router: &MoeRouter, tokens: u64) -> Vec<bool> {
    let (rows, alignment) = (router.num_expanded_tokens(tokens), u64::from(router.config().alignment));
    let mut dropped = vec![false; topk_idx.len()];
    let mut row = 0u64;
    for expert in 0..router.config().num_experts as i64 {
        for slot in (0..topk_idx.len()).filter(|slot| topk_idx[*slot] == expert) {
            dropped[slot] = row >= rows;
            row += 1;
        }
        row = row.next_multiple_of(alignment);
    }
    dropped
}

/// One token through all experts, and the gradient back. What an expert reads goes through e4m3 if the layer's does, and its gradient goes
/// straight through that.
fn dense(problem: &Problem, x: &[f32], grad_out: &[f32], logits: &[f32], chosen: &[usize], dropped: &[bool]) -> Token {
    let (e, h) = (logits.len(), x.len());
    let scores: Vec<f64> = logits.iter().map(|x| softplus(f64::from(*x)).sqrt()).collect();
    let sum: f64 = chosen.iter().map(|expert| scores[*expert]).sum();
    let worst = chosen.iter().map(|expert| scores[*expert]).fold(f64::INFINITY, f64::min);
    let others = (0..e).filter(|expert| !chosen.contains(expert)).map(|expert| scores[expert]).fold(0.0, f64::max);

    let seen: Vec<f64> = if problem.options.quantise { through_e4m3(x) } else { x.iter().map(|x| f64::from(*x)).collect() };
    let mut token = Token { out: vec![0.0; h], grad_x: vec![0.0; h], grad_logits: vec![0.0; e], mischosen: others - worst };
    // Every expert computes; those that were not chosen have the weight 0.
    let mut grad_weights = vec![0.0; e];
    for expert in 0..e {
        let slot = chosen.iter().position(|chosen| *chosen == expert);
        let takes_part = slot.is_some_and(|slot| !dropped[slot]);
        let weight = if takes_part { scores[expert] / sum * f64::from(FACTOR) } else { 0.0 };
        let (y, grad_x) = through(problem, expert, &seen, grad_out, weight);
        if takes_part {
            grad_weights[expert] = y.iter().zip(grad_out).map(|(y, grad)| y * f64::from(*grad)).sum();
        }
        token.out.iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
        token.grad_x.iter_mut().zip(grad_x).for_each(|(sum, grad)| *sum += grad);
    }
    // weight = factor * score / sum of the chosen scores, and d score / d logit = sigmoid / (2 * score).
    let mean: f64 = chosen.iter().map(|expert| grad_weights[*expert] * scores[*expert]).sum::<f64>() / sum;
    for expert in chosen {
        let of_score = f64::from(FACTOR) * (grad_weights[*expert] - mean) / sum;
        token.grad_logits[*expert] = of_score * sigmoid(f64::from(logits[*expert])) / (2.0 * scores[*expert]);
    }
    for (grad, gate) in token.grad_logits.iter().zip(problem.gate.chunks(h)) {
        token.grad_x.iter_mut().zip(gate).for_each(|(sum, w)| *sum += grad * f64::from(*w));
    }
    token
}

/// One expert: what it gives, and `weight * grad_out` brought back to what it was given.
fn through(problem: &Problem, expert: usize, x: &[f64], grad_out: &[f32], weight: f64) -> (Vec<f64>, Vec<f64>) {
    let (up, down) = problem.experts.of(expert);
    let (h, i) = (problem.experts.hidden, problem.experts.intermediate);
    let z: Vec<f64> = up.chunks(h).map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect();
    let y = down.chunks(i).map(|row| row.iter().zip(&z).map(|(w, z)| f64::from(*w) * z * sigmoid(*z)).sum()).collect();
    let mut grad_z = vec![0.0; i];
    for (row, grad) in down.chunks(i).zip(grad_out) {
        grad_z.iter_mut().zip(row).for_each(|(sum, w)| *sum += weight * f64::from(*grad) * f64::from(*w));
    }
    let mut grad_x = vec![0.0; h];
    for ((row, grad), z) in up.chunks(h).zip(grad_z).zip(z) {
        let slope = sigmoid(z) * (1.0 + z * (1.0 - sigmoid(z)));
        grad_x.iter_mut().zip(row).for_each(|(sum, w)| *sum += grad * slope * f64::from(*w));
    }
    (y, grad_x)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// What is left of a token: each group scaled so that its largest value is 448, in f32 as the op's documentation has it.
fn through_e4m3(x: &[f32]) -> Vec<f64> {
    let group = |group: &[f32]| {
        let amax = group.iter().fold(1e-4f32, |amax, x| amax.max(x.abs()));
        let (sf, inv) = (amax / 448.0, 448.0 / amax);
        group.iter().map(|x| f64::from(E4m3::from_f32(x * inv).to_f32() * sf)).collect::<Vec<_>>()
    };
    x.chunks(NUM_PER_CHANNELS as usize).flat_map(group).collect()
}
