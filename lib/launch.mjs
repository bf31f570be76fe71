// Starts a script of bin/ on Node 20, 22 and 24. The first line of every script calls it; it is
// plain JavaScript because it runs before anything that could understand TypeScript.
import { realpathSync } from 'node:fs'
import { createRequire } from 'node:module'
import { basename, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'

const script = realpathSync(process.argv[2] ?? '')
const require = createRequire(import.meta.url)

const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
if (major < 20 || (major === 20 && minor < 11)) {
  stop(`Node ${process.versions.node} is too old: version 20.11 or newer is needed`)
}
try {
  require.resolve('zx')
} catch {
  stop(`the npm packages are missing: run "npm ci" in ${resolve(import.meta.dirname, '..')}`)
}

// Node 22.18 and later read TypeScript by themselves, in half the time that tsx takes.
if (!process.features.typescript) {
  const { register } = await import('tsx/esm/api')
  register()
}

process.argv.splice(1, 2, script)
await import(pathToFileURL(script).href)

/** @param {string} reason */
function stop(reason) {
  console.error(`${basename(process.argv[2] ?? 'launch')}: ${reason}`)
  process.exit(1)
}
