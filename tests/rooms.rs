//! The rooms of `src/`: who imports whom. Imports run down the table of `lib.rs`, and no two parts import each other in a
//! circle: neither rooms, nor folders within a room, nor files within a folder.
//!
//! Read from the source itself: every path that a file names, through `use` or in the code, is followed through the
//! re-exports of `mod.rs` to the file that defines it. What stands behind `#[cfg(test)]` is left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

#[test]
fn imports_run_downward() {
    let order = rooms_of(&fs::read_to_string("src/lib.rs").unwrap());
    let house = House::read(Path::new("src/lib.rs"));
    let listed: BTreeSet<&str> = order.iter().map(String::as_str).collect();
    let built: BTreeSet<&str> = house.modules[0].children.keys().map(String::as_str).collect();
    assert_eq!(listed, built, "the table of src/lib.rs lists the rooms of src");
    let place = |room: &str| order.iter().position(|listed| listed == room);
    let upward: Vec<_> = house
        .imports()
        .iter()
        .filter(|import| place(&house.room(import.to)) < place(&house.room(import.from)))
        .map(|import| house.shown(import))
        .collect();
    assert!(upward.is_empty(), "imports that run up the table of src/lib.rs:\n{}", upward.join("\n"));
}

#[test]
fn nothing_imports_in_circles() {
    let found = House::read(Path::new("src/lib.rs")).circles();
    let shown: Vec<_> = found.values().map(String::as_str).collect();
    assert!(found.is_empty(), "{} circles of imports:\n\n{}", found.len(), shown.join("\n"));
}

/// The rules find what they look for, in a house made for it.
#[test]
fn circles_and_upward_imports_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("lib.rs", "//! | [`high`] | above |\n//! | [`low`] | below |\nmod high; mod low;");
    write("high/mod.rs", "mod a; mod b; mod c; pub use a::A;");
    write("high/a.rs", "use super::b; use crate::low::{self, Low}; struct A(b::B, Low);");
    // Not circles: a test of a; the word in a text, in a comment.
    write(
        "high/b.rs",
        "struct B; /* use super::A; */ const T: &str = \"super::A\"; #[cfg(test)] mod tests { use super::super::A; }",
    );
    write("high/c.rs", "fn c() { low(super::D); }");
    write("low.rs", "struct Low;");
    let read = || House::read(&folder.path().join("lib.rs"));
    assert!(read().circles().is_empty(), "{:?}", read().circles());
    assert_eq!(read().imports().len(), 3, "a → b, a → low, c → mod");
    // A name through the re-export of mod.rs, within a macro.
    write("high/b.rs", "fn b() { println!(\"{}\", super::A::new()) }");
    assert_eq!(read().circles().keys().collect::<Vec<_>>(), ["high: a, b"]);
    write("high/b.rs", "struct B;");
    write("low.rs", "use crate::high::{c::C as Other, A}; struct Low;");
    assert_eq!(read().circles().keys().collect::<Vec<_>>(), ["high, low"]);
    assert_eq!(rooms_of(&fs::read_to_string(folder.path().join("lib.rs")).unwrap()), ["high", "low"]);
}

/// The rooms that the table in the documentation of `lib.rs` lists, from the top down.
fn rooms_of(text: &str) -> Vec<String> {
    let row = |line: &str| Some(line.strip_prefix("//! | [`")?.split_once('`')?.0.to_owned());
    text.lines().filter_map(row).collect()
}

/// One file.
struct Module {
    /// `["coreml", "read", "package"]`
    path: Vec<String>,
    parent: usize,
    children: BTreeMap<String, usize>,
    /// What `use` brings in: the name here, the path, and whether it only passes it on.
    uses: Vec<Use>,
    /// The paths in its code, of two names at least, and all single names.
    paths: Vec<Vec<String>>,
    names: BTreeSet<String>,
    /// What it defines, on whatever level.
    defined: BTreeSet<String>,
}

struct Use {
    name: String,
    path: Vec<String>,
    public: bool,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    from: usize,
    to: usize,
    /// The path as it is written.
    written: String,
}

/// Of a folder: which part imports which, and how.
type Parts = BTreeMap<String, BTreeMap<String, Vec<Import>>>;

struct House {
    /// The first is `lib.rs`.
    modules: Vec<Module>,
}

impl House {
    fn read(lib: &Path) -> Self {
        let mut house = Self { modules: Vec::new() };
        house.add(lib, lib.parent().unwrap(), Vec::new(), 0);
        house
    }

    /// Reads `file` and the files that it declares, which lie in `folder`.
    fn add(&mut self, file: &Path, folder: &Path, path: Vec<String>, parent: usize) -> usize {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let tokens: TokenStream = text.parse().unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let mut words = Vec::new();
        flatten(tokens, &mut words);
        let mut module = Module {
            path,
            parent,
            children: BTreeMap::new(),
            uses: Vec::new(),
            paths: Vec::new(),
            names: BTreeSet::new(),
            defined: BTreeSet::new(),
        };
        let declared = module.read(&words);
        let (index, path) = (self.modules.len(), module.path.clone());
        self.modules.push(module);
        for name in declared {
            let (flat, nested) = (folder.join(format!("{name}.rs")), folder.join(&name).join("mod.rs"));
            let file = if flat.exists() { flat } else { nested };
            let child = self.add(&file, &folder.join(&name), [&path[..], std::slice::from_ref(&name)].concat(), index);
            self.modules[index].children.insert(name, child);
        }
        index
    }

    /// The file that defines what `path` leads to from `from`, and whether it is all of the file; nothing where it leads
    /// out of the house.
    fn find(&self, from: usize, path: &[String], steps: usize) -> Option<(usize, bool)> {
        let mut rest = path;
        let mut here = match rest.first()?.as_str() {
            "crate" => 0,
            "self" => from,
            "super" => self.modules[from].parent,
            name if self.modules[from].children.contains_key(name) => {
                rest = path;
                return self.walk(from, rest, steps);
            }
            name => {
                // What a `use` of this file brought in.
                let used =
                    self.modules[from].uses.iter().find(|used| used.name == name && used.path[..] != path[..1])?;
                let whole = [&used.path[..], &path[1..]].concat();
                return if steps == 0 { None } else { self.find(from, &whole, steps - 1) };
            }
        };
        rest = &rest[1..];
        while rest.first().is_some_and(|name| name == "super") {
            (here, rest) = (self.modules[here].parent, &rest[1..]);
        }
        self.walk(here, rest, steps)
    }

    fn walk(&self, mut here: usize, path: &[String], steps: usize) -> Option<(usize, bool)> {
        for (at, name) in path.iter().enumerate() {
            let module = &self.modules[here];
            if let Some(&child) = module.children.get(name) {
                here = child;
                continue;
            }
            if let Some(used) = module.uses.iter().find(|used| used.name == *name).filter(|_| steps > 0) {
                let whole = [&used.path[..], &path[at + 1..]].concat();
                return self.find(here, &whole, steps - 1);
            }
            // `pub use …::*`
            let all = module.uses.iter().filter(|used| used.name == "*" && !module.defined.contains(name));
            let mut all =
                all.filter_map(|used| self.find(here, &used.path[..used.path.len() - 1], steps.checked_sub(1)?));
            let through = all.find(|(file, _)| self.modules[*file].defined.contains(name));
            return Some((through.map_or(here, |(file, _)| file), false));
        }
        Some((here, true))
    }

    fn imports(&self) -> BTreeSet<Import> {
        let mut imports = BTreeSet::new();
        for (from, module) in self.modules.iter().enumerate() {
            // A name that is only passed on is nobody's import; a file that is brought in counts where it is used.
            let used = module.uses.iter().filter(|used| !used.public || module.names.contains(&used.name));
            // `Name::…` of a name that was brought in is counted where it was.
            let is_of_file = |path: &&Vec<String>| {
                let first = &path[..1];
                ["crate", "self", "super"].contains(&first[0].as_str())
                    || self.find(from, first, 16).is_some_and(|(_, whole)| whole)
            };
            for path in used.map(|used| &used.path).chain(module.paths.iter().filter(is_of_file)) {
                match self.find(from, path, 16) {
                    Some((to, false)) if to != from => {
                        imports.insert(Import { from, to, written: path.join("::") });
                    }
                    _ => {}
                }
            }
        }
        imports
    }

    /// A file's way down the folders, with `mod` at the end for one that has files below it.
    fn way(&self, index: usize) -> Vec<String> {
        let mut way = self.modules[index].path.clone();
        if !self.modules[index].children.is_empty() {
            way.push("mod".to_owned());
        }
        way
    }

    fn room(&self, index: usize) -> String {
        self.modules[index].path.first().cloned().unwrap_or_default()
    }

    fn shown(&self, import: &Import) -> String {
        format!("  {} → {}: {}", self.way(import.from).join("/"), self.way(import.to).join("/"), import.written)
    }

    /// The circles, by the folder and the parts in it that import each other, with the imports that tie them.
    fn circles(&self) -> BTreeMap<String, String> {
        // By folder: which part imports which.
        let mut folders: BTreeMap<Vec<String>, Parts> = BTreeMap::new();
        for import in self.imports() {
            let (from, to) = (self.way(import.from), self.way(import.to));
            let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
            let parts = folders.entry(from[..shared].to_vec()).or_default();
            parts.entry(from[shared].clone()).or_default().entry(to[shared].clone()).or_default().push(import);
        }
        let mut circles = BTreeMap::new();
        for (folder, parts) in &folders {
            let reached: BTreeMap<&String, BTreeSet<&String>> =
                parts.keys().map(|part| (part, reach(parts, part))).collect();
            let circle_of = |part| -> Vec<&String> {
                let back = |other: &&String| reached.get(*other).is_some_and(|reached| reached.contains(part));
                reached[part].iter().copied().filter(back).collect()
            };
            for circle in parts.keys().map(circle_of).filter(|circle| !circle.is_empty()).collect::<BTreeSet<_>>() {
                let names = circle.iter().map(|part| part.as_str()).collect::<Vec<_>>().join(", ");
                let name = if folder.is_empty() { names } else { format!("{}: {names}", folder.join("/")) };
                let ties = circle.iter().flat_map(|part| &parts[*part]).filter(|(to, _)| circle.contains(to));
                let ties: Vec<_> = ties.flat_map(|(_, imports)| imports).map(|import| self.shown(import)).collect();
                circles.insert(name.clone(), format!("{name}\n{}\n", ties.join("\n")));
            }
        }
        circles
    }
}

/// All parts that `part` imports, straight or through others.
fn reach<'a, T>(parts: &'a BTreeMap<String, BTreeMap<String, T>>, part: &'a String) -> BTreeSet<&'a String> {
    let mut reached = BTreeSet::new();
    let mut open = vec![part];
    while let Some(next) = open.pop() {
        open.extend(parts.get(next).into_iter().flat_map(BTreeMap::keys).filter(|part| reached.insert(*part)));
    }
    reached
}

impl Module {
    /// Takes the uses and paths out of a file's words; the names of the modules that it declares.
    fn read(&mut self, words: &[String]) -> Vec<String> {
        let mut declared = Vec::new();
        let mut at = 0;
        while at < words.len() {
            let word = |offset: usize| words.get(at + offset).map_or("", String::as_str);
            if word(0) == "use" {
                // `pub use`, `pub(crate) use`
                let public = at > 0 && (words[at - 1] == "pub" || words[at - 1] == ")");
                let end = at + words[at..].iter().position(|word| word == ";").unwrap();
                self.read_use(&words[at + 1..end], &mut Vec::new(), public);
                at = end;
            } else if word(0) == "mod" && is_name(word(1)) && word(2) == ";" {
                declared.push(word(1).to_owned());
                at += 2;
            } else if is_name(word(0)) {
                if ["struct", "enum", "trait", "type", "const", "static", "fn"].contains(&word(0)) {
                    self.defined.insert(word(1).to_owned());
                }
                let mut path = vec![word(0).to_owned()];
                while word(2 * path.len() - 1) == "::" && is_name(word(2 * path.len())) {
                    path.push(word(2 * path.len()).to_owned());
                }
                at += 2 * path.len() - 1;
                self.names.insert(path[0].clone());
                // Not the rest of a path: `<T as …>::name`.
                if path.len() > 1 {
                    self.paths.push(path);
                }
                continue;
            }
            at += 1;
        }
        declared
    }

    /// A tree of a `use`: `a::{b, c as d}`; what is left of `words` after it.
    fn read_use<'a>(&mut self, mut words: &'a [String], before: &mut Vec<String>, public: bool) -> &'a [String] {
        let length = before.len();
        let mut name = None;
        loop {
            match words.first().map(String::as_str) {
                Some("{") => {
                    words = &words[1..];
                    while words[0] != "}" {
                        words = self.read_use(words, before, public);
                        if words[0] == "," {
                            words = &words[1..];
                        }
                    }
                    words = &words[1..];
                    break;
                }
                Some("*") => {
                    // All of a file.
                    self.uses.push(Use {
                        name: "*".to_owned(),
                        path: [&before[..], &["*".to_owned()]].concat(),
                        public,
                    });
                    words = &words[1..];
                    break;
                }
                Some("::") => words = &words[1..],
                Some("as") => {
                    name = Some(words[1].clone());
                    words = &words[2..];
                }
                // `a::{self, b}`
                Some("self") if !before.is_empty() => {
                    words = &words[1..];
                    self.uses.push(Use { name: before.last().unwrap().clone(), path: before.clone(), public });
                    break;
                }
                Some(part) if is_name(part) => {
                    before.push(part.to_owned());
                    words = &words[1..];
                    if words.first().is_none_or(|next| next == "," || next == "}" || next == "as") {
                        if words.first().is_some_and(|next| next == "as") {
                            name = Some(words[1].clone());
                            words = &words[2..];
                        }
                        let name = name.take().unwrap_or_else(|| part.to_owned());
                        self.uses.push(Use { name, path: before.clone(), public });
                        break;
                    }
                }
                _ => break,
            }
        }
        before.truncate(length);
        words
    }
}

fn is_name(word: &str) -> bool {
    word.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// The words of a file: names, `::`, punctuation; without literals, comments, and what stands behind `#[cfg(test)]`.
fn flatten(tokens: TokenStream, words: &mut Vec<String>) {
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Punct(sign) if sign.as_char() == '#' => {
                let Some(TokenTree::Group(attribute)) = tokens.next_if(|next| matches!(next, TokenTree::Group(_)))
                else {
                    continue;
                };
                if attribute.stream().to_string().replace(' ', "") == "cfg(test)" {
                    // The item: up to its body or its semicolon.
                    for token in tokens.by_ref() {
                        match token {
                            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => break,
                            TokenTree::Punct(sign) if sign.as_char() == ';' => break,
                            _ => {}
                        }
                    }
                }
            }
            TokenTree::Punct(sign) if sign.as_char() == ':' => match tokens.peek() {
                Some(TokenTree::Punct(next)) if next.as_char() == ':' => {
                    tokens.next();
                    words.push("::".to_owned());
                }
                _ => words.push(":".to_owned()),
            },
            TokenTree::Punct(sign) => words.push(sign.as_char().to_string()),
            TokenTree::Ident(name) => words.push(name.to_string()),
            TokenTree::Literal(_) => words.push("\"\"".to_owned()),
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::None => ("", ""),
                };
                words.push(open.to_owned());
                flatten(group.stream(), words);
                words.push(close.to_owned());
            }
        }
    }
}
