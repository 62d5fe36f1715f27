//! Takes the one assembly file of the device compiler apart, and puts the entries of each op together again.
//!
//! The text of an op must depend on that op alone, or every change would make every kernel count as changed: comments
//! go, and labels lose the number of the function that LLVM put into them.

use std::collections::{BTreeMap, BTreeSet};

/// Ends the common head of an op's file; the host cuts a single entry out by these lines.
pub const ENTRY_MARK: &str = "// entry ";

/// In the assembly: `// ferrotile.bounds NAME THREADS [BLOCKS]`, from the `kernel!` macro.
const BOUNDS_MARK: &str = "// ferrotile.bounds ";

/// A module as the device compiler wrote it.
#[derive(Debug)]
pub struct Module {
    /// `.version`, `.target` and `.address_size` lines.
    header: Vec<String>,
    /// Everything else at module scope, in the order of the file.
    items: Vec<Item>,
}

/// One declaration or definition at module scope.
#[derive(Debug, PartialEq, Eq)]
struct Item {
    name: String,
    is_entry: bool,
    text: String,
}

impl Module {
    /// Read an assembly file.
    pub fn parse(asm: &str) -> Result<Self, String> {
        let mut bounds = bounds(asm)?;
        let mut module = Self { header: Vec::new(), items: Vec::new() };
        for statement in statements(&strip_comments(asm))? {
            let first = statement.split_whitespace().next().unwrap_or_default();
            match first {
                ".version" | ".target" | ".address_size" => module.header.push(statement),
                _ => {
                    let mut item = Item::new(&statement)?;
                    if item.is_entry
                        && let Some(directives) = bounds.remove(&item.name)
                    {
                        item.add_bounds(&directives)?;
                    }
                    // The same declaration may come from several kernels.
                    if !module.items.contains(&item) {
                        module.items.push(item);
                    }
                }
            }
        }
        if let Some(name) = bounds.keys().next() {
            return Err(format!("launch bounds for `{name}`, but there is no such entry"));
        }
        if module.header.len() != 3 {
            return Err(format!("expected .version, .target and .address_size, got {:?}", module.header));
        }
        Ok(module)
    }

    /// The ops (what stands before the first `__`) and their entries, sorted.
    pub fn ops(&self) -> Result<BTreeMap<String, Vec<String>>, String> {
        let mut ops: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for item in self.items.iter().filter(|item| item.is_entry) {
            let Some((op, _)) = item.name.split_once("__") else {
                return Err(format!("entry `{}` is not called OP__KERNEL", item.name));
            };
            ops.entry(op.to_owned()).or_default().push(item.name.clone());
        }
        ops.values_mut().for_each(|entries| entries.sort());
        Ok(ops)
    }

    /// One PTX file with these entries and all that they need.
    pub fn text(&self, entries: &[String]) -> String {
        let mut text = String::from("// Written by `cargo xtask ptx`; do not edit.\n");
        for line in &self.header {
            text.push_str(line);
            text.push('\n');
        }
        let needed = self.closure(entries);
        for item in self.items.iter().filter(|item| !item.is_entry && needed.contains(item.name.as_str())) {
            text.push('\n');
            text.push_str(&item.text);
        }
        for name in entries {
            text.push_str(&format!("\n{ENTRY_MARK}{name}\n"));
            for item in self.items.iter().filter(|item| item.is_entry && item.name == *name) {
                text.push_str(&item.text);
            }
        }
        text
    }

    /// The text of an entry and of every function that it reaches.
    pub fn reached_code(&self, entry: &str) -> String {
        let needed = self.closure(&[entry.to_owned()]);
        self.items.iter().filter(|item| needed.contains(item.name.as_str())).map(|item| item.text.as_str()).collect()
    }

    /// Names of the items that these reach, themselves included.
    fn closure(&self, from: &[String]) -> BTreeSet<&str> {
        let known: BTreeSet<&str> = self.items.iter().map(|item| item.name.as_str()).collect();
        let mut reached = BTreeSet::new();
        let mut open: Vec<&str> = known.iter().copied().filter(|name| from.iter().any(|wanted| wanted == name)).collect();
        while let Some(name) = open.pop() {
            if reached.insert(name) {
                for item in self.items.iter().filter(|item| item.name == name) {
                    open.extend(identifiers(&item.text).filter_map(|word| known.get(word)));
                }
            }
        }
        reached
    }
}

impl Item {
    fn new(statement: &str) -> Result<Self, String> {
        let is_entry = statement.split_whitespace().any(|word| word == ".entry");
        let name = if is_entry {
            after_word(statement, ".entry").and_then(|rest| identifiers(rest).next())
        } else if let Some(rest) = after_word(statement, ".func") {
            // `.func name(...)` or `.func (.param .b32 result) name(...)`, perhaps with .noreturn and the like between.
            let rest = rest.trim_start();
            let rest = if rest.starts_with('(') { rest.split_once(')').map_or("", |(_, rest)| rest) } else { rest };
            identifiers(rest).next()
        } else if [".global", ".const", ".shared", ".extern"].iter().any(|word| after_word(statement, word).is_some()) {
            // `.extern .shared .align 128 .b8 name[];` and `.global .align 4 .b8 name[4] = {...};`
            let declaration = statement.split(['[', '=', ';']).next().unwrap_or_default();
            declaration.split_whitespace().last().and_then(|word| identifiers(word).next())
        } else {
            None
        };
        match name {
            Some(name) => Ok(Self { name: name.to_owned(), is_entry, text: rename_locals(statement) + "\n" }),
            None => Err(format!("unknown declaration: {}", statement.lines().next().unwrap_or_default())),
        }
    }

    /// Put launch bounds between the parameters and the body.
    fn add_bounds(&mut self, directives: &str) -> Result<(), String> {
        match self.text.find('{') {
            Some(body) => {
                self.text.insert_str(body, directives);
                Ok(())
            }
            None => Err(format!("entry `{}` has no body", self.name)),
        }
    }
}

/// The launch bounds in the file, as directives.
fn bounds(asm: &str) -> Result<BTreeMap<String, String>, String> {
    let mut bounds = BTreeMap::new();
    for line in asm.lines() {
        let Some(rest) = line.trim().strip_prefix(BOUNDS_MARK) else { continue };
        let words: Vec<&str> = rest.split_whitespace().collect();
        let number = |word: &str| word.trim_end_matches("u32").parse::<u32>().map_err(|_| format!("not a number in `{line}`"));
        let directives = match words[..] {
            [_, threads] => format!(".maxntid {}, 1, 1\n", number(threads)?),
            [_, threads, blocks] => format!(".maxntid {}, 1, 1\n.minnctapersm {}\n", number(threads)?, number(blocks)?),
            _ => return Err(format!("expected NAME THREADS [BLOCKS] in `{line}`")),
        };
        bounds.insert(words[0].to_owned(), directives);
    }
    Ok(bounds)
}

/// Comments, trailing space and empty lines removed; `//` inside a string stays.
fn strip_comments(asm: &str) -> String {
    let mut text = String::with_capacity(asm.len());
    for line in asm.lines() {
        let mut in_string = false;
        let mut end = line.len();
        let bytes = line.as_bytes();
        for i in 0..bytes.len() {
            if bytes[i] == b'"' {
                in_string = !in_string;
            } else if !in_string && bytes[i..].starts_with(b"//") {
                end = i;
                break;
            }
        }
        let line = line[..end].trim_end();
        if !line.is_empty() {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// The statements at module scope: directives without an end mark are one line, functions end with their body, all
/// others with a semicolon.
fn statements(text: &str) -> Result<Vec<String>, String> {
    let mut statements = Vec::new();
    let mut current = String::new();
    let mut depth = 0_u32;
    for line in text.lines() {
        if current.is_empty() && [".version", ".target", ".address_size"].iter().any(|word| after_word(line, word).is_some()) {
            statements.push(line.trim().to_owned());
            continue;
        }
        for c in line.chars() {
            if current.is_empty() && c.is_whitespace() {
                continue;
            }
            current.push(c);
            let ends = match c {
                '{' => {
                    depth += 1;
                    false
                }
                '}' => {
                    depth = depth.checked_sub(1).ok_or_else(|| format!("a `}}` too many in `{line}`"))?;
                    // The braces of an initialiser are followed by a semicolon.
                    depth == 0 && [".entry", ".func"].iter().any(|word| after_word(&current, word).is_some())
                }
                ';' => depth == 0,
                _ => false,
            };
            if ends {
                statements.push(std::mem::take(&mut current));
            }
        }
        if !current.is_empty() {
            current.push('\n');
        }
    }
    if current.is_empty() { Ok(statements) } else { fail_at(&current) }
}

fn fail_at<T>(statement: &str) -> Result<T, String> {
    Err(format!("no end found of: {}", statement.lines().next().unwrap_or_default()))
}

/// What follows a word that stands alone in the text.
fn after_word<'t>(text: &'t str, word: &str) -> Option<&'t str> {
    text.match_indices(word).find_map(|(at, _)| {
        let rest = &text[at + word.len()..];
        let starts = at == 0 || text[..at].ends_with(char::is_whitespace);
        (starts && !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_' || c == '.')).then_some(rest)
    })
}

/// Names in a text. Directives and instructions come too; no symbol is called like one.
fn identifiers(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '$' | '%' | '.')))
        .filter(|word| word.starts_with(|c: char| c.is_alphabetic() || matches!(c, '_' | '$' | '%')))
}

/// `$L__BB12_3` becomes `$L__BB_3`, and `__local_depot12` becomes `__local_depot`: both are local to a function, and the 12 counts the
/// functions before it.
fn rename_locals(text: &str) -> String {
    ["$L__BB", "__local_depot"].iter().fold(text.to_owned(), |text, prefix| without_numbers_after(&text, prefix))
}

fn without_numbers_after(text: &str, prefix: &str) -> String {
    let mut renamed = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(prefix) {
        let (before, name) = rest.split_at(at + prefix.len());
        renamed.push_str(before);
        rest = name.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    renamed + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASM: &str = r#"//
// Generated by LLVM NVPTX Back-End
//

.version 7.8
.target sm_90
.address_size 64

	// .globl	cast__one__b                // -- Begin function cast__one__b
.extern .shared .align 128 .b8 dynamic_smem[];
// ferrotile.bounds cast__one__b 256 4
// ferrotile.bounds gate__top 128
.extern .func helper
(
	.param .b64 helper_param_0
)
;
.global .align 4 .b8 table[4] = {1, 2, 3, 4};
.global .align 8 .u64 pointer[1] = {table};
.global .align 1 .b8 unused[3] = {47, 47, 0};

                                        // @cast__one__b
.visible .entry cast__one__b(
	.param .u64 .ptr .align 1 cast__one__b_param_0
)
{
	.reg .pred 	%p<2>;
	mov.u32 	%r1, dynamic_smem;
	@%p1 bra 	$L__BB0_2;
	bra.uni $L__BB0_12;
$L__BB0_2:
	// begin inline asm
	{ .reg .pred p; mov.u32 %r1, 0; }
	// end inline asm
$L__BB0_12:
	ret;
                                        // -- End function
}
.visible .entry cast__one__a()
{
	mov.u64 	%rd1, pointer;
	ret;
}
.visible .entry gate__top(
	.param .b32 gate__top_param_0
)
{
	.local .align 4 .b8 	__local_depot2[8];
	mov.b64 	%SPL, __local_depot2;
	call.uni 	helper, (param0);
$L__BB2_1:
	bra $L__BB2_1;
}
.func  (.param .b32 func_retval0) helper(
	.param .b64 helper_param_0
)
{
	call.uni (retval0), deeper, ();
	ret;
}
.visible .func deeper()
{
	trap;
}
"#;

    fn module() -> Module {
        Module::parse(ASM).unwrap()
    }

    #[test]
    fn entries_are_grouped_by_op_and_sorted() {
        let ops = module().ops().unwrap();
        assert_eq!(ops.keys().collect::<Vec<_>>(), ["cast", "gate"]);
        assert_eq!(ops["cast"], ["cast__one__a", "cast__one__b"]);
        assert_eq!(ops["gate"], ["gate__top"]);
    }

    #[test]
    fn a_file_holds_what_its_entries_need_and_no_more() {
        let module = module();
        let text = module.text(&module.ops().unwrap()["cast"]);
        let expected = r#"// Written by `cargo xtask ptx`; do not edit.
.version 7.8
.target sm_90
.address_size 64

.extern .shared .align 128 .b8 dynamic_smem[];

.global .align 4 .b8 table[4] = {1, 2, 3, 4};

.global .align 8 .u64 pointer[1] = {table};

// entry cast__one__a
.visible .entry cast__one__a()
{
	mov.u64 	%rd1, pointer;
	ret;
}

// entry cast__one__b
.visible .entry cast__one__b(
	.param .u64 .ptr .align 1 cast__one__b_param_0
)
.maxntid 256, 1, 1
.minnctapersm 4
{
	.reg .pred 	%p<2>;
	mov.u32 	%r1, dynamic_smem;
	@%p1 bra 	$L__BB_2;
	bra.uni $L__BB_12;
$L__BB_2:
	{ .reg .pred p; mov.u32 %r1, 0; }
$L__BB_12:
	ret;
}
"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn functions_come_with_their_callees_and_their_prototypes() {
        let module = module();
        let text = module.text(&module.ops().unwrap()["gate"]);
        assert!(text.contains(".extern .func helper\n(") && text.contains(".func  (.param .b32 func_retval0) helper("));
        assert!(text.contains(".visible .func deeper()") && text.contains(".maxntid 128, 1, 1\n{"));
        assert!(!text.contains("table") && !text.contains("dynamic_smem") && !text.contains("minnctapersm"));
        assert!(module.reached_code("gate__top").contains("trap;"));
        assert!(!module.reached_code("cast__one__a").contains("trap;"));
    }

    #[test]
    fn the_text_does_not_depend_on_other_ops() {
        let gone = ASM.find(".visible .entry cast__one__b(").unwrap()..ASM.find(".visible .entry cast__one__a(").unwrap();
        let mut asm = ASM
            .replace("$L__BB2_1", "$L__BB1_1")
            .replace("__local_depot2", "__local_depot1")
            .replace("// ferrotile.bounds cast__one__b 256 4\n", "");
        let removed = gone.start - "// ferrotile.bounds cast__one__b 256 4\n".len()
            ..gone.end - "// ferrotile.bounds cast__one__b 256 4\n".len();
        asm.replace_range(removed, "");
        let less = Module::parse(&asm).unwrap();
        assert!(!less.ops().unwrap()["cast"].contains(&"cast__one__b".to_owned()));
        let entries = vec!["gate__top".to_owned()];
        assert_eq!(less.text(&entries), module().text(&entries));
    }

    #[test]
    fn a_declaration_repeated_is_kept_once() {
        let again = ".extern .shared .align 128 .b8 dynamic_smem[];\n";
        let asm = ASM.replacen(again, &again.repeat(3), 1);
        let text = Module::parse(&asm).unwrap().text(&["cast__one__b".to_owned()]);
        assert_eq!(text.matches(again).count(), 1);
    }

    #[test]
    fn odd_input_is_an_error() {
        let error = |from: &str, to: &str| {
            assert!(ASM.contains(from));
            let module = Module::parse(&ASM.replacen(from, to, 1));
            module.and_then(|module| module.ops().map(|_| ())).unwrap_err()
        };
        assert!(error(".version 7.8\n", "").contains(".version"));
        assert!(error("bounds gate__top 128", "bounds gate__tip 128").contains("gate__tip"));
        assert!(error("bounds gate__top 128", "bounds gate__top many").contains("not a number"));
        assert!(error("\ttrap;\n}\n", "\ttrap;\n").contains("no end found"));
        assert!(error(".global .align 4", ".surprise .align 4").contains("unknown declaration: .surprise"));
        assert!(error(".visible .entry gate__top(", ".visible .entry gate(").contains("launch bounds for `gate__top`"));
        assert!(error(".visible .entry cast__one__a(", ".visible .entry main(").contains("`main` is not called"));
    }
}
