// For tests on Node 20, which start scripts hundreds of times: TypeScript without its types, kept in
// a cache, in half of tsx's time. bin.test.mts starts every script as users do, with tsx.
import { createHash } from 'node:crypto'
import { readFile, rename, writeFile } from 'node:fs/promises'
import { register } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { isMainThread, threadId } from 'node:worker_threads'

// Node loads this module once more in the thread of its hooks.
if (isMainThread && !process.features.typescript) {
  register(import.meta.url)
  // The launcher then leaves tsx out.
  Object.assign(process.features, { typescript: 'strip' })
}

/** @type {import('node:module').LoadHook} */
export async function load(url, context, nextLoad) {
  if (!url.endsWith('.mts')) return await nextLoad(url, context)
  const sourcefile = fileURLToPath(url)
  const text = await readFile(sourcefile, 'utf8')
  const hash = createHash('sha256').update(text).digest('hex')
  const cached = join(tmpdir(), `strip-types-${hash}.mjs`)
  let source = await readFile(cached, 'utf8').catch(() => '')
  if (!source) {
    // Loaded when needed, as it takes as long as a script.
    const { default: ts } = await import('typescript')
    const compilerOptions = {
      ...{ target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext },
      ...{ verbatimModuleSyntax: true, inlineSourceMap: true },
    }
    source = ts.transpileModule(text, { compilerOptions, fileName: sourcefile }).outputText
    const partial = `${cached}.${process.pid}.${threadId}`
    await writeFile(partial, source)
    await rename(partial, cached)
  }
  return { format: 'module', source, shortCircuit: true }
}
