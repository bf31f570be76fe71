// Starts a script of bin/, whose first lines call it. JavaScript: it runs before TypeScript can.
import { realpathSync } from 'node:fs'
import { createRequire } from 'node:module'
import { basename, resolve } from 'node:path'
import { pathToFileURL } from 'node:url'

const root = resolve(import.meta.dirname ?? '.', '..')
const require = createRequire(import.meta.url)
const install = `cd ${JSON.stringify(root)} && npm ci`
const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
if (major < 20 || (major === 20 && minor < 11)) {
  const hint = 'brew install node, or https://nodejs.org/en/download'
  stop(`Node ${process.versions.node} is too old: version 20.11 or newer is needed`, hint)
}
try {
  require.resolve('zx')
} catch {
  stop('the npm packages are missing', install)
}

// Node says that reading TypeScript is experimental, which is not for the user of a script.
process.removeAllListeners('warning')
process.on('warning', (warning) => {
  // Nor is a warning of many listeners on one signal: there is one for each machine.
  if (!/^(Experimental|MaxListenersExceeded)Warning$/.test(warning.name))
    console.error(`${warning.name}: ${warning.message}`)
})

// Node 22.18 and later read TypeScript by themselves, in half the time that tsx takes.
if (!process.features.typescript) {
  try {
    const { register } = await import('tsx/esm/api')
    register()
  } catch (error) {
    // esbuild is a program for one system: node_modules may have been copied from another.
    const reason = String(error instanceof Error ? error.message : error).split('\n')[0]
    stop(`the npm packages do not work on this system: ${reason}`, install)
  }
}
const script = realpathSync.native(process.argv[2] ?? '')
process.argv.splice(1, 2, script)
await import(pathToFileURL(script).href)

/** @param {string} reason @param {string} hint */
function stop(reason, hint) {
  console.error(`${basename(process.argv[2] ?? 'launch')}: ${reason}\n  hint:    ${hint}`)
  process.exit(1)
}
