//! `model.mil`: a program as text.

use std::fmt::Write;

use anyhow::{Context, Result, bail, ensure};

use super::source::Source;
use super::unsupported::unsupported;
use super::values::{Dialect, print_text, print_type, print_value, tensor_type};
use crate::coreml::format::proto::{Argument, BindingKind, Function, NamedValueType, Operation};

/// Sets of operations: the name in the model, the name in the text.
const OPSETS: [(&str, &str); 4] =
    [("CoreML5", "ios15"), ("CoreML6", "ios16"), ("CoreML7", "ios17"), ("CoreML8", "ios18")];

/// Under which name this program stands among a model's `buildInfo`, where Apple's compiler has entries of its own.
const PRODUCER: &str = "palettist-version";

/// The name in the text of a function's set of operations.
pub fn opset(function: &Function) -> Result<&'static str> {
    match OPSETS.iter().find(|(name, _)| *name == function.opset) {
        Some((_, name)) => Ok(name),
        None => unsupported(&format!("its set of operations is {:?}", function.opset)),
    }
}

/// The program of a model as text.
///
/// # Errors
/// [`Unsupported`](super::Unsupported); the program is not sound.
pub fn print(source: &Source) -> Result<String> {
    let dialect = Dialect::of(source.specification_version);
    let program = &source.program;
    ensure!(program.version == 1, "the program's version is {}, not 1", program.version);
    let version = if dialect == Dialect::One { "1.0" } else { "1.3" };
    let mut out = format!("program({version})\n");
    print_build_info(source, dialect, &mut out)?;
    out.push_str("{\n");
    for (name, function) in &program.functions {
        identifier(name)?;
        print_function(name, function, dialect, &mut out).with_context(|| format!("function {name}"))?;
    }
    out.push('}');
    Ok(out)
}

fn print_build_info(source: &Source, dialect: Dialect, out: &mut String) -> Result<()> {
    if let Some(key) = source.program.attributes.keys().find(|key| *key != "buildInfo") {
        unsupported(&format!("its program has the attribute {key:?}"))?;
    }
    let mut entries = match source.program.attributes.get("buildInfo") {
        Some(own) => own.texts().context("buildInfo is not a dictionary of texts")?,
        None => Vec::new(),
    };
    entries.retain(|(key, _)| key != PRODUCER);
    entries.push((PRODUCER.to_owned(), env!("CARGO_PKG_VERSION").to_owned()));
    entries.sort();
    let text = dialect.scalar("string");
    write!(out, "[buildInfo = dict<{text}, {text}>({{")?;
    for (place, (key, value)) in entries.iter().enumerate() {
        out.push_str(if place > 0 { ", {" } else { "{" });
        print_text(key, out)?;
        out.push_str(", ");
        print_text(value, out)?;
        out.push('}');
    }
    out.push_str("})]\n");
    Ok(())
}

fn print_function(name: &str, function: &Function, dialect: Dialect, out: &mut String) -> Result<()> {
    let Some(block) = function.block_specializations.get(&function.opset) else {
        bail!("it has no block for its set of operations, {:?}", function.opset);
    };
    if function.block_specializations.len() > 1 {
        unsupported("a function has blocks for several sets of operations")?;
    }
    if !function.attributes.is_empty() || !block.attributes.is_empty() || !block.inputs.is_empty() {
        unsupported("a function has attributes, or its block has inputs")?;
    }
    write!(out, "    func {name}<{}>(", opset(function)?)?;
    // The text has them sorted by name, whatever order callers see them in.
    let mut inputs: Vec<&NamedValueType> = function.inputs.iter().collect();
    inputs.sort_by(|a, b| a.name.cmp(&b.name));
    print_named(&inputs, dialect, out)?;
    out.push_str(") {\n");
    for (number, operation) in block.operations.iter().enumerate() {
        print_operation(operation, dialect, out)
            .with_context(|| format!("operation {number}, {}", operation.r#type.escape_debug()))?;
    }
    out.push_str("        } -> (");
    for (place, output) in block.outputs.iter().enumerate() {
        if place > 0 {
            out.push_str(", ");
        }
        out.push_str(identifier(output)?);
    }
    out.push_str(");\n");
    Ok(())
}

/// Types and names, `tensor<fp16, [1]> a, tensor<fp16, [1]> b`.
fn print_named(named: &[&NamedValueType], dialect: Dialect, out: &mut String) -> Result<()> {
    for (place, value) in named.iter().enumerate() {
        if place > 0 {
            out.push_str(", ");
        }
        print_type(tensor_type(value.r#type.as_ref())?, dialect, out)?;
        write!(out, " {}", identifier(&value.name)?)?;
    }
    Ok(())
}

fn print_operation(operation: &Operation, dialect: Dialect, out: &mut String) -> Result<()> {
    if !operation.blocks.is_empty() {
        unsupported("it has control flow")?;
    }
    ensure!(!operation.outputs.is_empty(), "it has no outputs");
    out.push_str("            ");
    print_named(&operation.outputs.iter().collect::<Vec<_>>(), dialect, out)?;
    write!(out, " = {}(", identifier(&operation.r#type)?)?;
    for (place, (name, argument)) in operation.inputs.iter().enumerate() {
        if place > 0 {
            out.push_str(", ");
        }
        write!(out, "{} = ", identifier(name)?)?;
        print_argument(argument, dialect, out).with_context(|| format!("argument {name}"))?;
    }
    out.push(')');
    for (place, (name, value)) in operation.attributes.iter().enumerate() {
        out.push_str(if place > 0 { ", " } else { "[" });
        write!(out, "{} = ", identifier(name)?)?;
        print_value(value, dialect, out).with_context(|| format!("attribute {name}"))?;
    }
    out.push_str(if operation.attributes.is_empty() { ";\n" } else { "];\n" });
    Ok(())
}

fn print_argument(argument: &Argument, dialect: Dialect, out: &mut String) -> Result<()> {
    let bound = &argument.arguments;
    ensure!(!bound.is_empty(), "it is bound to nothing");
    if bound.len() > 1 {
        out.push('(');
    }
    for (place, binding) in bound.iter().enumerate() {
        if place > 0 {
            out.push_str(", ");
        }
        match &binding.binding {
            Some(BindingKind::Name(name)) => out.push_str(identifier(name)?),
            Some(BindingKind::Value(value)) => print_value(value, dialect, out)?,
            None => bail!("a binding is empty"),
        }
    }
    if bound.len() > 1 {
        out.push(')');
    }
    Ok(())
}

/// A name as it stands in the text, which nothing else can pass for.
fn identifier(name: &str) -> Result<&str> {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    let is_one = name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit() || c == '@');
    ensure!(is_one, "{:.80} is not a name that a program can have", format!("{name:?}"));
    Ok(name)
}
