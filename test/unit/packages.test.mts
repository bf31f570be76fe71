// What a user's computer gets by npm ci: exact versions, under licences that the docs name.
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, it } from 'node:test'
import { projectRoot } from '../checkout.mts'

interface Package {
  version: string
  license?: string
  dev?: boolean
  integrity?: string
  dependencies?: Record<string, string>
  devDependencies?: Record<string, string>
}

const read = (file: string) => readFile(join(projectRoot, file), 'utf8')
const lock: { packages: Record<string, Package> } = JSON.parse(await read('package-lock.json'))
const own: Package = JSON.parse(await read('package.json'))
const { '': _root, ...installed } = lock.packages
const shipped = Object.entries(installed).filter(([, { dev }]) => !dev)

describe('the packages', () => {
  it('have exact versions, and a hash', () => {
    for (const [name, wanted] of Object.entries({ ...own.dependencies, ...own.devDependencies })) {
      assert.match(wanted, /^(npm:@[a-z]+\/[a-z-]+@)?\d+\.\d+\.\d+$/, name)
    }
    for (const [path, { integrity }] of Object.entries(installed)) {
      assert.match(integrity ?? '', /^sha512-/, path)
    }
  })

  it('that are shipped allow any use', () => {
    const licences = new Set(shipped.map(([, { license }]) => license))
    assert.deepEqual([...licences].sort(), [
      '(BSD-3-Clause OR GPL-2.0)',
      'Apache-2.0',
      'ISC',
      'MIT',
    ])
  })

  it('each stand in the docs with their licence', async () => {
    const text = await read('docs/technical-choices.md')
    for (const name of Object.keys(own.dependencies ?? {})) {
      const license = installed[`node_modules/${name}`]?.license?.replace(/^\((.*)\)$/, '$1')
      assert.ok(text.includes(`\n| ${name} | ${license} | `), `${name}: ${license}`)
    }
  })

  it('bring no others than the docs name', () => {
    const others = shipped.map(([path]) => path.replace('node_modules/', '')).sort()
    const expected = /^(@esbuild\/|@lydell\/node-pty-|(esbuild|fsevents)$)/
    const unknown = others.filter((name) => !expected.test(name) && !own.dependencies?.[name])
    assert.deepEqual(unknown, [])
  })
})
