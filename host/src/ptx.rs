//! The compiled kernels: one PTX text an op, and the part of it that one kernel needs.
//!
//! `cargo xtask ptx` writes them. In each text a line `// entry NAME` stands before every kernel; what comes before the first
//! such line (version, target, shared declarations) is common to all. One kernel is cut out and compiled at a time, so that
//! the first launch pays for nothing that is not used.
#![cfg_attr(not(feature = "cuda"), allow(dead_code))]

use std::ffi::CString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// Texts that do not ship with the crate, such as the one of the device layer's own tests.
static REGISTERED: RwLock<Vec<(&'static str, &'static str)>> = RwLock::new(Vec::new());

/// Make the PTX of an op known that is not embedded in this crate.
pub fn register(op: &'static str, text: &'static str) {
    let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
    if registered.iter().all(|(known, _)| *known != op) {
        registered.push((op, text));
    }
}

/// The PTX of an op.
pub fn text(op: &str) -> Option<&'static str> {
    let find = |texts: &[(&str, &'static str)]| texts.iter().find(|(known, _)| *known == op).map(|(_, text)| *text);
    find(EMBEDDED).or_else(|| find(&REGISTERED.read().unwrap_or_else(PoisonError::into_inner)))
}

/// Line that stands before each kernel of a text.
const MARK: &str = "// entry ";

/// The module with only the kernel `name`.
pub fn cut(text: &str, name: &str) -> Option<String> {
    let mut module = String::new();
    let (mut keep, mut found) = (true, false);
    for line in text.split_inclusive('\n') {
        if let Some(entry) = line.strip_prefix(MARK) {
            keep = entry.trim_end() == name;
            found |= keep;
        }
        if keep {
            module.push_str(line);
        }
    }
    found.then_some(module)
}

/// The module with only the kernel `name`, followed by `more`, as the driver reads it: up to its only zero byte, which is the last one.
pub fn module(text: &str, name: &str, more: &str) -> Option<CString> {
    CString::new(cut(text, name)? + more).ok()
}

/// A line that no text had before: behind a module it keeps the driver from finding that in its cache of compiled texts.
///
/// All ASCII, which is all that the driver's compiler reads; `Debug` of a `Duration`, for one, may say `µs`.
pub fn fresh_comment() -> String {
    static LINES: AtomicU64 = AtomicU64::new(0);
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("// {time} ns, process {}, line {}\n", std::process::id(), LINES.fetch_add(1, Ordering::Relaxed))
}

/// Every kernel of the embedded texts: op, kernel.
pub fn kernels() -> impl Iterator<Item = (&'static str, &'static str)> {
    let names = |text: &'static str| text.lines().filter_map(|line| line.strip_prefix(MARK)).map(str::trim_end);
    EMBEDDED.iter().flat_map(move |(op, text)| names(text).map(move |name| (*op, name)))
}

/// PTX ISA version of a text.
pub fn isa(text: &str) -> Option<(u32, u32)> {
    let version = text.lines().find_map(|line| line.trim().strip_prefix(".version "))?;
    let (major, minor) = version.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The oldest CUDA release and Linux driver that understand a PTX ISA version.
pub fn driver_for(isa: (u32, u32)) -> &'static str {
    match isa {
        (..=7, ..=8) => "CUDA 11.8 (driver 520) or newer",
        (8, 0) => "CUDA 12.0 (driver 525) or newer",
        (8, 1) => "CUDA 12.1 (driver 530) or newer",
        (8, 2) => "CUDA 12.2 (driver 535) or newer",
        (8, 3) => "CUDA 12.3 (driver 545) or newer",
        (8, 4) => "CUDA 12.4 (driver 550) or newer",
        (8, 5) => "CUDA 12.5 (driver 555) or newer",
        (8, 6) => "CUDA 12.7 (driver 565) or newer",
        (8, 7) => "CUDA 12.8 (driver 570) or newer",
        (8, 8) => "CUDA 12.9 (driver 575) or newer",
        (9, 0) => "CUDA 13.0 (driver 580) or newer",
        _ => "a driver that is newer than CUDA 13.0",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
.version 7.8
.target sm_90
.extern .shared .align 128 .b8 shared[];
// entry op__a
.visible .entry op__a() { ret; }
// entry op__a__wide
.visible .entry op__a__wide() { ret; }
// entry op__b
.visible .entry op__b() { ret; }
";

    #[test]
    fn one_kernel_and_the_head_are_cut_out() {
        let head = ".version 7.8\n.target sm_90\n.extern .shared .align 128 .b8 shared[];\n";
        for name in ["op__a", "op__a__wide", "op__b"] {
            let expected = format!("{head}// entry {name}\n.visible .entry {name}() {{ ret; }}\n");
            assert_eq!(cut(TEXT, name).unwrap(), expected);
        }
        assert!(cut(TEXT, "op__").is_none());
        assert!(cut("", "op__a").is_none());
    }

    #[test]
    fn a_text_for_the_driver_is_new_each_time() {
        let texts: Vec<CString> = (0..100).map(|_| module(TEXT, "op__a", &fresh_comment()).unwrap()).collect();
        for (i, text) in texts.iter().enumerate() {
            let bytes = text.as_bytes_with_nul();
            assert!(bytes.is_ascii(), "{text:?}");
            assert_eq!(bytes.iter().position(|b| *b == 0), Some(bytes.len() - 1));
            // The comment is a line of its own behind the module, and changes nothing else.
            let (module, comment) = text.to_str().unwrap().split_at(cut(TEXT, "op__a").unwrap().len());
            assert_eq!(Some(module), cut(TEXT, "op__a").as_deref());
            assert!(comment.starts_with("// ") && comment.find('\n') == Some(comment.len() - 1), "{comment:?}");
            assert!(!texts[..i].contains(text), "{text:?} came twice");
        }
        assert_eq!(module(TEXT, "op__b", "").unwrap().to_str().unwrap(), cut(TEXT, "op__b").unwrap());
        assert!(module(TEXT, "op__c", "").is_none() && module(TEXT, "op__a", "\0").is_none());
    }

    #[test]
    fn the_version_is_read() {
        assert_eq!(isa(TEXT), Some((7, 8)));
        assert_eq!(isa("//\n\t.version 8.6\n"), Some((8, 6)));
        assert_eq!(isa("no header"), None);
        assert_eq!(driver_for((7, 8)), "CUDA 11.8 (driver 520) or newer");
        assert_eq!(driver_for((9, 0)), "CUDA 13.0 (driver 580) or newer");
    }

    #[test]
    fn texts_can_be_registered() {
        assert!(text("ptx_test_op").is_none());
        register("ptx_test_op", TEXT);
        register("ptx_test_op", "ignored");
        assert_eq!(text("ptx_test_op"), Some(TEXT));
    }

    #[test]
    fn every_embedded_kernel_is_marked() {
        for (op, text) in EMBEDDED {
            let names: Vec<_> =
                text.lines().filter_map(|l| l.split_once(".entry ")).map(|(_, n)| n.split('(').next().unwrap()).collect();
            assert!(!names.is_empty(), "{op}");
            for name in names {
                let module = cut(text, name).unwrap_or_else(|| panic!("{op}: no mark before {name}"));
                assert_eq!(module.matches(".entry ").count(), 1, "{op}: {name}");
                // A last line without an end would become one with the comment of `fresh_comment`.
                assert!(module.is_ascii() && module.ends_with('\n'), "{op}: {name}");
            }
        }
    }
}
