import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { assertSkew, type Upgrade } from '../../../lib/upgrade/version-skew.mts'

const upgrade = (role: Upgrade['role'], from: string, to: string, others: Partial<Upgrade> = {}) =>
  assertSkew({
    name: role === 'worker' ? 'sigma' : 'alpha',
    role,
    from: `v${from}`,
    to: `v${to}`,
    apiServer: 'v1.36.3',
    kubelets: new Map([
      ['sigma', 'v1.36.3'],
      ['gamma', 'v1.36.3'],
    ]),
    ...others,
  })

describe('an upgrade may', () => {
  it('bring the next minor version to the control plane', () => {
    upgrade('control-plane', '1.36.3', '1.37.0')
  })

  it('bring another patch, or the same version again', () => {
    upgrade('control-plane', '1.36.3', '1.36.9')
    upgrade('control-plane', '1.36.3', '1.36.1')
    upgrade('worker', '1.36.3', '1.36.3')
  })

  it('take a kubelet over several minor versions, up to that of the API server', () => {
    upgrade('worker', '1.33.2', '1.36.3')
  })
})

describe('an upgrade may not', () => {
  it('leave a minor version of the control plane out', () => {
    assert.throws(() => upgrade('control-plane', '1.36.3', '1.38.0'), /leaves 1 minor version out/)
    assert.throws(() => upgrade('control-plane', '1.36.3', '1.39.0'), /leaves 2 minor versions out/)
  })

  it('go back', () => {
    assert.throws(
      () => upgrade('control-plane', '1.37.0', '1.36.3'),
      /^StepError: alpha: .*go back/,
    )
    assert.throws(
      () => upgrade('worker', '1.36.3', '1.35.9'),
      /go back from v1\.36\.3 to v1\.35\.9/,
    )
  })

  it('make a kubelet newer than the API server', () => {
    assert.throws(
      () => upgrade('worker', '1.36.3', '1.37.0'),
      /sigma: its kubelet would be v1\.37\.0, newer than the API server \(v1\.36\.3\)/,
    )
  })

  it('leave a kubelet more than three minor versions behind, which it names', () => {
    const kubelets = new Map([
      ['sigma', 'v1.34.0'],
      ['gamma', 'v1.33.5'],
    ])
    assert.throws(
      () => upgrade('control-plane', '1.36.3', '1.37.0', { kubelets }),
      /too new for gamma v1\.33\.5$/m,
    )
    upgrade('control-plane', '1.35.3', '1.36.0', { kubelets })
  })
})
