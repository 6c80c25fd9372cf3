//! `report.html`: a run on one page, from what lies in its folder: losses, pictures, config. No script, no network.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use crate::files::write_bytes;

/// Size of a curve's drawing, px.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 180.0;

/// Writes `folder/report.html`. `facts` are shown as a table.
///
/// # Errors
/// The folder can't be written.
pub fn write_report(folder: &Path, title: &str, facts: &[(&str, String)]) -> Result<()> {
    let mut page = String::new();
    let title = escaped(title);
    write!(
        page,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\n<style>body{{font:16px/1.5 \
         system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222}}img,svg{{max-width:100%}}\
         td{{padding:0 1rem 0 0}}pre{{background:#f4f4f4;padding:1rem;overflow:auto}}</style>\n<h1>{title}</h1>\n<table>"
    )?;
    for (name, value) in facts {
        write!(page, "<tr><td>{}</td><td>{}</td></tr>", escaped(name), escaped(value))?;
    }
    page.push_str("</table>\n");
    let metrics = fs::read_to_string(folder.join("logs/metrics.jsonl")).unwrap_or_default();
    let lines: Vec<Value> = metrics.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    for name in ["loss", "loss/validation", "palette_error"] {
        let points: Vec<(f64, f64)> =
            lines.iter().filter_map(|line| Some((line.get("step")?.as_f64()?, line.get(name)?.as_f64()?))).collect();
        if points.len() > 1 {
            curve(&mut page, name, &points)?;
        }
    }
    let mut samples: Vec<_> = fs::read_dir(folder.join("samples"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".png") && !name.starts_with('.'))
        .collect();
    samples.sort();
    for name in samples {
        let name = escaped(&name);
        writeln!(page, "<h2>{name}</h2><img src=\"samples/{name}\" alt=\"pictures drawn at {name}\">")?;
    }
    let config = fs::read_to_string(folder.join("config.resolved.toml")).unwrap_or_default();
    writeln!(page, "<h2>Config</h2><pre>{}</pre></html>", escaped(&config))?;
    write_bytes(&folder.join("report.html"), page.as_bytes())
}

/// A line over steps, from 0 to its largest value.
fn curve(page: &mut String, name: &str, points: &[(f64, f64)]) -> Result<()> {
    let last_step = points.iter().map(|p| p.0).fold(1.0, f64::max);
    let largest = points.iter().map(|p| p.1).fold(f64::MIN_POSITIVE, f64::max);
    let (_, last) = points[points.len() - 1];
    write!(
        page,
        "<h2>{}</h2><p>last {last:.6}, largest {largest:.6}, {last_step} steps</p><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         role=\"img\"><polyline fill=\"none\" stroke=\"#36c\" stroke-width=\"1.5\" points=\"",
        escaped(name)
    )?;
    for (step, value) in points {
        write!(page, "{:.1},{:.1} ", step / last_step * WIDTH, HEIGHT * (1.0 - value / largest))?;
    }
    page.push_str("\"/></svg>\n");
    Ok(())
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_becomes_one_page() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::create_dir_all(path.join("logs")).unwrap();
        fs::create_dir_all(path.join("samples")).unwrap();
        fs::write(path.join("logs/metrics.jsonl"), "{\"step\":1,\"loss\":2.0}\n{\"step\":2,\"loss\":1.0}\n").unwrap();
        fs::write(path.join("samples/step-000002.png"), "").unwrap();
        fs::write(path.join("config.resolved.toml"), "name = \"<b>\"").unwrap();
        write_report(path, "dog & cat", &[("bits", "2".into())]).unwrap();
        let page = fs::read_to_string(path.join("report.html")).unwrap();
        for expected in
            ["dog &amp; cat", "<td>bits</td><td>2</td>", "360.0,0.0 720.0,90.0", "samples/step-000002.png", "&lt;b&gt;"]
        {
            assert!(page.contains(expected), "no {expected} in {page}");
        }
    }
}
