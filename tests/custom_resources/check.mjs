// Compares custom resources with their definitions: an array of objects on standard input, a problem a line on standard
// output. The packages' validators check types, patterns and what is required; TypeScript, against the packages' types,
// finds the fields that there are not.
import { readFileSync } from "node:fs";
import ts from "typescript";

const PACKAGES = {
  "cert-manager.io": "cert-manager",
  "gateway.envoyproxy.io": "envoy-gateway",
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};

const objects = JSON.parse(readFileSync(0, "utf8"));
const problems = [];
const lines = [];
for (const [number, object] of objects.entries()) {
  const group = object.apiVersion.split("/")[0];
  const module = `@kubernetes-models/${PACKAGES[group]}/${object.apiVersion}/${object.kind}`;
  const { [object.kind]: Model } = await import(module);
  try {
    new Model(object).validate();
  } catch (error) {
    problems.push(`${number} ${object.kind}: ${error.message}`);
  }
  lines.push(`import type { I${object.kind} as I${number} } from "${module}"; export const o${number}: I${number} = ${JSON.stringify(object)};`);
}

const file = new URL("objects.ts", import.meta.url).pathname;
const options = { module: ts.ModuleKind.NodeNext, moduleResolution: ts.ModuleResolutionKind.NodeNext, strict: true, noEmit: true, skipLibCheck: true, types: [] };
const host = ts.createCompilerHost(options);
const read = host.getSourceFile.bind(host);
host.getSourceFile = (name, ...rest) => (name === file ? ts.createSourceFile(name, lines.join("\n"), ts.ScriptTarget.ESNext, true) : read(name, ...rest));
host.fileExists = (name) => name === file || ts.sys.fileExists(name);
const program = ts.createProgram([file], options, host);
for (const diagnostic of program.getSemanticDiagnostics(program.getSourceFile(file))) {
  const { line } = diagnostic.file.getLineAndCharacterOfPosition(diagnostic.start);
  problems.push(`${line} ${objects[line].kind}: ${ts.flattenDiagnosticMessageText(diagnostic.messageText, " ")}`);
}
console.log(problems.join("\n"));
process.exit(problems.length ? 1 : 0);
