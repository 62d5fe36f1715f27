//! A progress bar on a terminal, plain lines elsewhere.

use crate::{Failure, Result};
use indicatif::{ProgressBar, ProgressStyle};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// One piece of work that takes a while.
pub struct Progress {
    bar: ProgressBar,
    text: String,
    start: Instant,
    said: Instant,
}

impl Progress {
    /// Work of unknown length (`total` 0) or of `total` bytes.
    pub fn new(text: &str, total: u64) -> Self {
        let bar = if total == 0 { ProgressBar::new_spinner() } else { ProgressBar::new(total) };
        let template = if total == 0 {
            "{spinner} {msg} ({elapsed})"
        } else {
            "{spinner} {msg} {bar:30} {bytes}/{total_bytes} ({eta} left)"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(text.to_owned());
        if bar.is_hidden() {
            eprintln!("{text} ...");
        } else {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Self { bar, text: text.to_owned(), start: Instant::now(), said: Instant::now() }
    }

    /// So many bytes are there now. A log gets a line every 15 seconds, so that a slow network does not look like a hang.
    pub fn set(&mut self, bytes: u64) {
        self.bar.set_position(bytes);
        if self.bar.is_hidden() && self.said.elapsed() > Duration::from_secs(15) {
            self.said = Instant::now();
            eprintln!("{} ... {} MB after {:.0} s", self.text, bytes / 1_000_000, self.start.elapsed().as_secs_f32());
        }
    }

    /// The work is finished; `what` is what came of it.
    pub fn done(self, what: &str) {
        self.bar.finish_and_clear();
        eprintln!("{}: {what} ({:.1} s)", self.text, self.start.elapsed().as_secs_f32());
    }
}

/// Run a command in silence, calling `measure` about five times a second for the bytes that are there.
/// On a bad exit the error holds what the command wrote.
pub fn watch(progress: &mut Progress, command: &mut Command, measure: impl Fn() -> u64) -> Result {
    let what = crate::shell::describe(command);
    let error = |e: std::io::Error| Failure(format!("{what}: {e}"));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(error)?;
    // A thread drains each pipe, or a chatty command would wait for us for ever.
    let drain = |pipe: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            if let Some(mut pipe) = pipe {
                // What cannot be read is only missing from an error text.
                let _ = pipe.read_to_end(&mut text);
            }
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let stdout = drain(child.stdout.take().map(|p| Box::new(p) as _));
    let stderr = drain(child.stderr.take().map(|p| Box::new(p) as _));
    let status = loop {
        if let Some(status) = child.try_wait().map_err(error)? {
            break status;
        }
        progress.set(measure());
        std::thread::sleep(Duration::from_millis(50));
    };
    let said = stdout.join().unwrap_or_default() + &stderr.join().unwrap_or_default();
    if status.success() { Ok(()) } else { Err(Failure(format!("failed ({status}): {what}\n{}", said.trim_end()))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watched_command_that_fails_says_what_it_wrote() {
        let mut progress = Progress::new("testing", 10);
        // More than a pipe holds, on both streams.
        let script = "head -c 300000 /dev/zero | tr '\\0' x; echo reason >&2; exit 4";
        let Failure(text) = watch(&mut progress, Command::new("sh").args(["-c", script]), || 1).unwrap_err();
        assert!(text.ends_with("reason"));
        assert!(watch(&mut progress, &mut Command::new("true"), || 1).is_ok());
    }
}
